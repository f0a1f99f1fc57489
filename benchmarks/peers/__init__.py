"""The contestants: each module has `candidates(problem) -> Iterator[(variant, callable)]` and a process of its own."""

NAMES = ("effops", "eager", "inductor")
