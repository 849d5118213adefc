"""DSKD in the loops of other libraries: a module each, imported by those who ask for it."""
