"""What writes the tables of the documentation, from the code and from results: ``make table``."""
