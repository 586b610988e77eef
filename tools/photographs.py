"""Unpack the reference of `--data cutouts`: photographic stamps and textures of two Debian packages, in its folder layout.

    python tools/photographs.py                                    # apt-get download, no root
    python tools/photographs.py --stamps A.deb --textures B.deb    # files that you have brought

Which files, of which class or kind, in which group: benchmarks/photographs/*.tsv. The pictures are GPL-2 and Creative Commons of
several sorts (the packages' own copyright files); nothing of them is part of this repository or of anything that it ships.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).parents[1]


class Package(NamedTuple):
    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name}_{self.version}_all.deb"


STAMPS = Package("tuxpaint-stamps-default", "2022.06.04-1", "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34")
TEXTURES = Package("ufoai-textures", "2.5-2", "51c9c6a778249a3fa432c81c8c30ac5675ae5a1e675a33b0ce04545753d3218c")
_STAMPS_AT = "./usr/share/tuxpaint/stamps/"
_TEXTURES_AT = "./usr/share/games/ufoai/base/0textures.pk3"
_COPYRIGHT_AT = "./usr/share/doc/{}/copyright"
_BLOCK = 1 << 20


class Problem(Exception):
    """One sentence that says what to do."""


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sib_fast" / "photographs"


def read_list(path: Path) -> list[tuple[str, str, str]]:
    """(class or kind, group, file) of every line that is no comment."""
    lines = (line for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return [tuple(line.split("\t")) for line in lines]  # type: ignore[misc]


def fetch(package: Package, folder: Path) -> Path:
    """Download with apt-get, which as anybody writes into the current folder."""
    try:
        subprocess.run(
            ["apt-get", "download", f"{package.name}={package.version}"], cwd=folder, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        raise Problem(
            f"photographs: {package.file} must come from apt-get download, got {str(said).strip()}: bring it from "
            f"https://snapshot.debian.org/package/{package.name}/{package.version}/ and give its path"
        ) from error
    return folder / package.file


def verify(path: Path, package: Package) -> None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise Problem(f"photographs: {path} must be readable, got {error}") from error
    if digest.hexdigest() != package.sha256:
        raise Problem(f"photographs: {path} must be {package.file} of SHA-256 {package.sha256}, got {digest.hexdigest()}")


def data_member(path: Path) -> IO[bytes]:
    """The member data.tar of a .deb, which is an ar archive: headers of 60 bytes, members on even offsets."""
    file = path.open("rb")
    if file.read(8) != b"!<arch>\n":
        raise Problem(f"photographs: {path} must be a Debian package, got no ar archive")
    while header := file.read(60):
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            return file
        file.seek(size + size % 2, os.SEEK_CUR)
    raise Problem(f"photographs: {path} must be a Debian package, got no data.tar in it")


def members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of every file of a package, in one pass."""
    with data_member(path) as data, tarfile.open(fileobj=data, mode="r|*") as archive:
        for member in archive:
            if member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                yield member.name, content


def unpack(stamps: Path, textures: Path, out: Path, lists: Path = ROOT / "benchmarks" / "photographs") -> None:
    """Both packages into the layout of `--data cutouts`; the folder appears whole or not at all."""
    objects, backgrounds = (read_list(lists / f"{name}.tsv") for name in ("objects", "backgrounds"))
    wanted = {_STAMPS_AT + file: Path("objects", kind, group, Path(file).name) for kind, group, file in objects}
    notices = {_COPYRIGHT_AT.format(p.name): Path(f"copyright-{p.name}") for p in (STAMPS, TEXTURES)}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:

        def write(where: Path, content: bytes) -> None:
            (partial / where).parent.mkdir(parents=True, exist_ok=True)
            (partial / where).write_bytes(content)

        missing = set(wanted)
        for path in (stamps, textures):
            for name, content in members(path):
                where = wanted.get(name) or notices.get(name)
                if where is not None:
                    write(where, content.read())
                    missing.discard(name)
                elif name == _TEXTURES_AT:
                    with zipfile.ZipFile(io.BytesIO(content.read())) as archive:
                        for kind, group, file in backgrounds:
                            # names alone repeat: tex_mattn/rock004.png, tex_nature/rock004.png
                            where = Path("backgrounds", kind, group, file.replace("/", "_"))
                            write(where, archive.read(f"textures/{file}"))
        if missing or not (partial / "backgrounds").is_dir():
            raise Problem(
                f"photographs: the packages must hold all files of {lists}, got none for {min(missing or {_TEXTURES_AT})}"
            )
        partial.chmod(0o755)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, help=STAMPS.file)
    parser.add_argument("--textures", type=Path, help=TEXTURES.file)
    parser.add_argument("--out", type=Path, default=default_folder(), help="a new folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.out.exists():
        print(f"{args.out} exists; remove it to unpack again.")
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            given = ((args.stamps, STAMPS), (args.textures, TEXTURES))
            stamps, textures = (path or fetch(package, Path(folder)) for path, package in given)
            for path, package in ((stamps, STAMPS), (textures, TEXTURES)):
                verify(path, package)
            unpack(stamps, textures, args.out)
    except Problem as error:
        print(error, file=sys.stderr)
        return 2
    print(f"sib-fast train --data cutouts --root {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
