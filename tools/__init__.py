"""Tools for those who work on trimtab itself. Each is ``python -m tools.<name>``."""
