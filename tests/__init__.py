"""A package, so that `tests.oracle` is this folder's, whatever folder named tests an installed distribution has left."""
