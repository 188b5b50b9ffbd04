"""One request through a step: what is gathered, the plan that runs it, and what may be wrong."""
