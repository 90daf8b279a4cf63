def house() -> str:
    return ""


def step() -> str:
    return ""
