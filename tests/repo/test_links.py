"""The check of the site's links finds what leads nowhere, and lists what leads outside."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def check(site: Path, *options: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_links.py"), str(site), *options], capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_missing_pages_files_and_anchors_are_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a picture.svg").write_text("<svg/>")
    (tmp_path / "index.html").write_text(
        '<a href="sub/page.html#here">1</a><a href="#top" id="top">2</a><img src="a%20picture.svg"><a href="sub/">3</a>'
        '<a href="https://example.org/x">4</a><a href="mailto:a@b">5</a>'
    )
    page = tmp_path / "sub" / "page.html"
    page.write_text('<h1 id="here">x</h1><a href="../index.html#top">1</a>')
    (tmp_path / "sub" / "index.html").write_text("<p>x</p>")
    code, said = check(tmp_path, "--external")
    assert code == 0 and "5 internal links, 0 broken" in said and "https://example.org/x  (1 page, such as index.html)" in said
    page.write_text('<a href="../gone.html">1</a><a href="../index.html#gone">2</a><img src="gone.png"><a href="../../out">3</a>')
    code, said = check(tmp_path)
    assert code == 1
    assert "index.html: sub/page.html#here has an anchor that is not on that page" in said
    for link in ("../gone.html leads", "../index.html#gone has an anchor", "gone.png leads", "../../out leads"):
        assert f"sub/page.html: {link}" in said
    assert "https://example.org" not in said


def test_a_folder_without_a_site_says_what_to_do(tmp_path: Path) -> None:
    code, said = check(tmp_path)
    assert code == 1 and "make docs" in said
