"""The cells of a study, relative scores, and claims with intervals."""
