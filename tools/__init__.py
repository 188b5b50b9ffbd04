"""What writes the README's tables, from the code and from results: ``make table``."""
