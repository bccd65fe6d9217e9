def step(
    state: tuple[int, ...],
    settings: tuple[float, ...],
    threads: int,
    gradient: int,
    factors: tuple[int, ...] = ...,
    last: tuple[int, ...] = ...,
) -> None: ...
