"""One config with a ladder -> the configs of its runs."""

from llamagen_dist.config.loader import build, merge, nest
from llamagen_dist.config.sections import GPTConfigFile
from llamagen_dist.errors import UserError


def rungs(config: GPTConfigFile) -> list[tuple[str, GPTConfigFile]]:
    """The runs a config asks for: itself, or one per ladder entry. Raises UserError for a key that does not exist."""
    if not config.ladder:
        return [(config.run_dir.name, config)]
    base = config.model_dump(exclude={"ladder"})
    found = []
    for name, changes in config.ladder.items():
        data = merge(base, nest(changes))
        data["run_dir"] = config.run_dir / name
        rung = build(GPTConfigFile, data, f"ladder.{name}")
        if rung.parallel.tensor != config.parallel.tensor:
            raise UserError(
                f"ladder.{name}: parallel.tensor cannot differ between rungs of one process start; "
                "train it as a run of its own"
            )
        found.append((name, rung))
    return found
