from benchmarks import headline
from benchmarks.harness import ROOT


def test_the_readme_says_what_the_benchmarks_have_measured():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("<!-- begin speed -->")[2].partition("<!-- end speed -->")[0]
    assert section.strip() == headline.section()
