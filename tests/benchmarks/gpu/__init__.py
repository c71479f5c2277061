"""Scripts that need a GPU; each skips without one."""
