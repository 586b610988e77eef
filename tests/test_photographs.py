"""The script that unpacks two Debian packages, on tiny ones made here, and the lists of files that it goes by."""

import hashlib
import io
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from tools import photographs
from tools.photographs import STAMPS, TEXTURES, main, read_list, unpack

LISTS = Path(photographs.ROOT) / "benchmarks" / "photographs"


def write_deb(path, files):
    """An ar archive as dpkg-deb makes it; the control member has an odd length, which is padded."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz") as archive:
        for name, value in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(value)
            archive.addfile(member, io.BytesIO(value))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": content.getvalue()}
    document = b"!<arch>\n"
    for name, value in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(value):<10}`\n".encode()
        document += header + value + b"\n" * (len(value) % 2)
    path.write_bytes(document)


@pytest.fixture
def packages(tmp_path):
    pk3 = io.BytesIO()
    with zipfile.ZipFile(pk3, "w") as archive:
        archive.writestr("textures/tex_a/rock.png", b"rock a")
        archive.writestr("textures/tex_b/rock.png", b"rock b")
    notice = "./usr/share/doc/{}/copyright"
    write_deb(
        tmp_path / "stamps.deb",
        {
            "./usr/share/tuxpaint/stamps/animals/cat.png": b"cat",
            "./usr/share/tuxpaint/stamps/animals/cat_mirror.png": b"tac",
            "./usr/share/tuxpaint/stamps/animals/drawing.png": b"no",
            notice.format(STAMPS.name): b"GPL",
        },
    )
    files = {"./usr/share/games/ufoai/base/0textures.pk3": pk3.getvalue(), notice.format(TEXTURES.name): b"CC"}
    write_deb(tmp_path / "textures.deb", files)
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "objects.tsv").write_text("# of\nmammal\tcat\tanimals/cat.png\nmammal\tcat\tanimals/cat_mirror.png\n")
    (lists / "backgrounds.tsv").write_text("rock\ta_rock\ttex_a/rock.png\nrock\tb_rock\ttex_b/rock.png\n")
    return tmp_path / "stamps.deb", tmp_path / "textures.deb", lists


def test_the_listed_files_and_no_other_land_in_the_layout(packages, tmp_path):
    stamps, textures, lists = packages
    out = tmp_path / "cache" / "photographs"
    unpack(stamps, textures, out, lists)
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert found == {
        "objects/mammal/cat/cat.png": b"cat",
        "objects/mammal/cat/cat_mirror.png": b"tac",
        "backgrounds/rock/a_rock/tex_a_rock.png": b"rock a",
        "backgrounds/rock/b_rock/tex_b_rock.png": b"rock b",
        f"copyright-{STAMPS.name}": b"GPL",
        f"copyright-{TEXTURES.name}": b"CC",
    }


def test_a_file_that_is_missing_leaves_no_folder(packages, tmp_path):
    stamps, textures, lists = packages
    (lists / "objects.tsv").write_text("mammal\tdog\tanimals/dog.png\n")
    with pytest.raises(photographs.Problem, match=r"must hold all files of .*, got none for .*dog"):
        unpack(stamps, textures, tmp_path / "cache" / "out", lists)
    assert not list((tmp_path / "cache").iterdir())


def test_another_file_than_the_pinned_one_is_refused(packages, tmp_path, capsys):
    stamps, textures, _ = packages
    assert main(["--stamps", str(stamps), "--textures", str(textures), "--out", str(tmp_path / "out")]) == 2
    digest = hashlib.sha256(stamps.read_bytes()).hexdigest()
    assert f"must be {STAMPS.file} of SHA-256 {STAMPS.sha256}, got {digest}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_connection_the_file_to_bring_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho E: no network >&2\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{STAMPS.file} must come from apt-get download, got E: no network: bring it from https://snapshot.debian.org" in said


@pytest.mark.parametrize(("name", "classes"), [("objects", 6), ("backgrounds", 6)])
def test_lists_name_every_file_once_and_have_groups_enough(name, classes):
    rows = read_list(LISTS / f"{name}.tsv")
    assert rows == sorted(rows)
    assert all(len(row) == 3 for row in rows)
    assert len({file for *_, file in rows}) == len(rows)
    groups = Counter(kind for kind, _ in {(kind, group) for kind, group, _ in rows})
    assert len(groups) == classes
    assert min(groups.values()) >= 10
