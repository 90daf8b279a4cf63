"""Plug-ins, which the package finds by their entry points and does not know by name."""
