"""Everything that one GPU can tell about the package, by one command."""
