"""Configurations of train.py by the names of their flags, whatever groups they are in."""

import dataclasses

import train


def change(config: train.Config, **flags: object) -> train.Config:
    """The configuration with other settings: `batch_size=4` is that of its group, `losses=...` a whole group."""
    groups = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in flags.items():
        homes = [
            group
            for group, content in groups.items()
            if group not in ("losses", "mesh")
            and dataclasses.is_dataclass(content)
            and name in {field.name for field in dataclasses.fields(content)}
        ]
        if name in ("data", "student") and isinstance(value, (str, tuple)) or name not in groups:
            (group,) = homes
            groups[group] = dataclasses.replace(groups[group], **{name: value})
        else:
            groups[name] = value
    return train.Config(**groups)


def config(out, steps: int, **flags: object) -> train.Config:
    """A configuration of the defaults and these settings."""
    return change(train.Config(train.RunConfig(out=out), train.OptimizerConfig(steps=steps)), **flags)
