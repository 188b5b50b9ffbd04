"""The commands of ``python -m fusedopt``, one a module with ``add_arguments`` and ``run``."""
