"""`python -m bench.host`: see bench/speed/host.py."""

from bench.speed.host import main

if __name__ == "__main__":
    raise SystemExit(main())
