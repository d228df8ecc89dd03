"""The ops in C++ for CPUs, behind the same interface: ``library`` builds and loads, ``program`` runs and records."""
