"""Complete, small programs that use fusedopt; each one also runs on its own."""
