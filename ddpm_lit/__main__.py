"""`python -m ddpm_lit` is the same as the command `ddpm_lit`."""

from ddpm_lit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
