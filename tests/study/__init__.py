"""Which method finds the best circuits, at which price: the study behind docs/which-method.md."""
