"""Stand-ins for packages that tests cannot have: each is put in place by its `install()`."""
