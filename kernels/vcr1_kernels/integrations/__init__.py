"""Drop-ins for other trainers: `trl`, `verl`, `openrlhf`, each a module to import by name.

Nothing is imported here, and the package root never imports this folder: each module needs the trainer it plugs into.
"""
