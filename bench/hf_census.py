"""`python -m bench.hf_census`: see bench/census/__main__.py."""

from bench.census.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
