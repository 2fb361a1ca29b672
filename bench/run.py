"""`python -m bench.run`: see bench/speed/run.py."""

from bench.speed.run import main

if __name__ == "__main__":
    raise SystemExit(main())
