"""`python -m bench.tune`: see bench/speed/tune.py."""

from bench.speed.tune import main

if __name__ == "__main__":
    raise SystemExit(main())
