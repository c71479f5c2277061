"""Methods with options, for tests that go through several of them."""


def with_steps(method: str, steps: int) -> str:
    """The method with that many steps, where it takes steps."""
    return f"{method}(steps={steps})" if method.startswith(("integrated", "learned", "mask")) else method
