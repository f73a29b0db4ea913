"""Papers are whole, or they are refused: both engines, on a paper that uses everything that papers use."""
import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from simulate import simulated_runs

from speedrun_nb.core.errors import SpeedrunError
import speedrun_nb.render.built_in as built_in
from speedrun_nb.render.render import render

PAPER = Path(__file__).parent / "render"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    "The paper, rendered once: HTML, typst's source, PDF."
    folder = tmp_path_factory.mktemp("paper").resolve() / "paper"
    shutil.copytree(PAPER, folder)
    compile_pdf, sources, told = built_in.compile_pdf, [], []

    def keep_source(source, work):
        sources.append(source)
        return compile_pdf(source, work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(built_in, "compile_pdf", keep_source)
        result = render(folder, engine="built-in", progress=told.append)
    assert result.engine.startswith("built-in (pandoc ") and told[0] == "paper.qmd: cell 1 of 8"
    assert result.outputs == [folder / "_output/paper.html", folder / "_output/paper.pdf"]
    assert sorted((folder / "_output").iterdir()) == result.outputs
    return result.outputs[0].read_text(encoding="utf-8"), sources[0], result.outputs[1]


def words(markup):
    "What a reader of the HTML sees."
    body = re.sub(r"<(style|annotation)\b.*?</\1>", "", markup, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", body)).replace("\u00a0", " "))


CAPTIONS = [
    "Table 1: Values in a table of Markdown",
    "Table 2: Means over n runs, after Welch (1947).",
    "Figure 1: Time by variant; see Section 3.",
    "Figure 2: A dot from a file.",
    "Figure 3: Computed from 2 rows.",
    "Table 3: Thirteen columns.",
    "Table 4: A table with sentences"]
SECTIONS = ["1 Results", "1.1 Figures", "Notes", "2 Method", "3 Limits", "4 Appendix: all runs", "4.1 baseline",
            "4.2 small_step", "References"]
REFERENCES = ("See Table 2 and Figure 1, Table 3, Figure 2, Figure 3, number 1, Section 3, Equation 1, Equation 2 "
              "and the method of Welch (1947; see also Tufte 2001, ch. 1).")
TEXT = [
    REFERENCES,
    "small_step gains 2.7 % on CIFAR-10, or 2 rows; small_step against a_b*c* <d> $e$ |f| @g.",
    "Not run: {python} gain, {r} gain.",
    "Two sentences about steps. They cite Welch (1947) and refer to Figure 1.",
    "January 31, 2026",
    "Ada Example, Institute of Steps",
    "total: 14",
    "ZeroDivisionError: division by zero",
    "(1)",
    "(2)",
    "A part that refers back to Figure 1 and runs code: 2 runs."]


def test_html_says_what_quarto_says(rendered):
    page = rendered[0]
    text = words(page)
    assert [text.count(caption) for caption in CAPTIONS] == [1] * len(CAPTIONS)
    headings = [words(match).strip() for match in re.findall(r"<h[2-6][^>]*>(.*?)</h[2-6]>", page, re.DOTALL)]
    assert headings == [*SECTIONS, "Table of contents"]
    assert [sentence for sentence in TEXT if sentence not in text] == []


def test_html_is_one_file_that_asks_for_nothing(rendered):
    page = rendered[0]
    sources = re.findall(r"""\bsrc=["']([^"']*)""", page)
    assert len(sources) == 3 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\(", page)
    links = re.findall(r"""\bhref=["']([^"']*)""", page)
    labels = set(re.findall(r"""\bid=["']([^"']*)""", page))
    assert all(link.startswith("#") and html.unescape(link[1:]) in labels for link in links)


def test_html_can_be_read_by_everyone(rendered):
    page = rendered[0]
    assert '<html lang="en">' in page and "<title>Does a smaller step pay?</title>" in page and page.count("<math") == 3
    descriptions = [html.unescape(alt) for alt in re.findall(r'\balt="([^"]*)"', page)]
    assert descriptions == ['Two bars, the "small" one lower.', "A blue dot.", "The dot again."]


def test_paper_and_screen_have_the_same_numbers(rendered):
    _, source, pdf = rendered
    assert pdf.read_bytes().startswith(b"%PDF")
    plain = re.sub(r"#link\(<[^>]*>\)\[([^\[\]]*)\]", r"\1", source)
    plain = re.sub(r"#(?:link\(<[^>]*>\)|emph|strong)?\[([^\[\]]*)\]", r"\1", plain)
    plain = re.sub(r"\s+", " ", plain.replace("~", " ").replace("\\", ""))
    assert [caption for caption in CAPTIONS if caption not in plain] == []
    headings = re.findall(r"^(?:=+ |#heading\(.*?\)\[)(.*?)\]?$", source, re.MULTILINE)
    assert [re.sub(r"#block\[|[\]\\]", "", heading) for heading in headings] == SECTIONS
    assert REFERENCES in plain and 'alt: "Two bars, the \\"small\\" one lower."' in source


@pytest.mark.skipif(not shutil.which("pdftotext"), reason="needs poppler")
def test_pdf_text(rendered):
    text = subprocess.run(["pdftotext", "-layout", rendered[2], "-"], capture_output=True, text=True).stdout
    text = re.sub(r"\s+", " ", text)
    assert [caption for caption in CAPTIONS if caption not in text] == []
    assert REFERENCES.replace("-", "‐")[:60] in text.replace("-", "‐")
    assert [heading for heading in SECTIONS if heading not in text] == []


@pytest.fixture
def paper(tmp_path):
    "Writes a paper of one document; answers with its folder."
    def write(body, name="paper.qmd"):
        for file in ("_quarto.yml", "references.bib", "dot.svg"): shutil.copy(PAPER / file, tmp_path)
        (tmp_path / name).write_text(body, encoding="utf-8")
        return tmp_path.resolve()
    return write


def refused(folder, *names, **options):
    "The message with which a paper is refused."
    with pytest.raises(SpeedrunError) as caught: render(folder, list(names) or None, **{"engine": "built-in"} | options)
    return str(caught.value)


def test_all_mistakes_are_told_at_once(paper):
    message = refused(paper("""---
title: "About `{python} n` runs"
bibliography: [references.bib, nowhere.bib]
---
## One {#sec-one}

See @fig-none, @tbl-twice, @sec-on, [@fig-none; @welch1947], @nobody2020, [a link](#nowhere).

![No such image](none.png){#fig-image}

::: {#tbl-twice}
| a |
|---|
| 1 |

One.
:::

::: {#tbl-twice}
| a |
|---|
| 1 |

Two.
:::

::: {#fig-bare}
![](dot.svg)
:::
"""))
    assert message.startswith("paper.qmd: 10 mistakes:\n- ")
    for part in (
            "title holds `{python} n`",
            "nowhere.bib does not exist",
            "@fig-none: nothing",
            '@sec-on: nothing that is numbered has this label. Did you mean "sec-one"?',
            "[@fig-none; @welch1947]: references and citations",
            "@nobody2020 is not in the bibliography",
            "the link to #nowhere leads nowhere",
            "none.png does not exist",
            "tbl-twice is used twice",
            "fig-bare has no caption"):
        assert part in message, part


def test_what_takes_quarto_is_told_before_anything_runs(paper):
    message = refused(paper("""---
title: A paper
---
{{< include part.qmd >}} and {{< meta title >}}

```{python}
raise Exception("this does not run")
```

::: {.callout-note title="A title"}
A note.
:::

:::: {.columns}
::: {.column width="50%"}
A column.
:::
::::

[Only here]{.content-visible when-format="html"}

{{< pagebreak >}}
"""))
    assert message.startswith("paper.qmd: 7 mistakes:\n- ") and message.count("pip install 'speedrun_nb[quarto]'") == 7
    for line, part in (
            (4, "{{< include part.qmd >}}"),
            (4, "{{< meta title >}}"),
            (10, "{.callout-note"),
            (14, "{.columns}"),
            (15, "{.column "),
            (20, "{.content-visible"),
            (22, "{{< pagebreak >}}")):
        assert f"paper.qmd, line {line}: {part}" in message


def test_a_callout_that_a_cell_prints_is_refused(paper):
    body = "```{python}\n#| output: asis\nprint(':::', '{.callout' + '-note}', chr(10), 'A note.', chr(10), ':::')\n```"
    assert "block {.callout-note} takes Quarto itself" in refused(paper(body))


def test_failing_code_leaves_the_last_paper(paper):
    folder = paper("Fine.\n")
    outputs = [path.read_bytes() for path in render(folder, engine="built-in").outputs]
    message = refused(paper("Text\n\n```{python}\n#| label: fig-time\nvalue = 1\nvalue / 0\n```\n"))
    assert message.startswith("paper.qmd, line 3, cell fig-time: ZeroDivisionError: division by zero")
    assert "----> 2 value / 0" in message
    assert [path.read_bytes() for path in sorted((folder / "_output").iterdir())] == outputs


@pytest.mark.parametrize("body, expected", [
    ("```{python}\nimport os; os._exit(1)\n```", "line 1: the kernel died"),
    ("---\njupyter: cobol\n---\n```{python}\n1\n```", 'no Jupyter kernel "cobol"'),
    ("```{python}\n#| lable: x\n1\n```", 'no cell option "lable". Did you mean "label"?'),
    ("```{r}\n1\n```", "only {python} cells"),
    ("```{python}\n", "never closed"),
    ("---\nformat: {typst: {papersize: b5}}\n---\nText.", 'no papersize "b5"'),
    ("A value of `{python} no_such_name`.", "NameError"),
    ("---\ntitle: [\n---\n", "paper.qmd, line 3"),
])
def test_refused(paper, body, expected):
    message = refused(paper(body))
    assert expected in message and message.startswith("paper.qmd")


def test_html_tables_are_for_screens_only(paper):
    folder = paper('```{python}\n#| label: frame\nimport pandas\npandas.DataFrame({"a": [1]})\n```\n')
    assert "frame: HTML, which a PDF cannot hold" in refused(folder)
    assert "<th>a</th>" in render(folder, formats=["html"], engine="built-in").outputs[0].read_text()


def test_the_same_document_gives_the_same_file(paper):
    folder = paper("""```{python}
#| label: fig-a
#| fig-cap: A line.
import matplotlib.pyplot as plt
plt.plot([1, 2])
plt.show()
```
""")
    first, second = (render(folder, formats=["html"], engine="built-in").outputs[0].read_bytes() for _ in range(2))
    assert first == second and b"data:image/svg+xml" in first


def test_choosing_documents(paper):
    folder = paper("Text.\n")
    result = render(folder, ["paper"], formats=["html"], engine="built-in")
    assert [path.name for path in result.outputs] == ["paper.html"]
    message = refused(folder, "papre")
    assert 'no document "papre" in' in message and 'Did you mean "paper.qmd"?' in message
    assert "is outside of" in refused(folder, "../paper")
    assert 'no format "docx"' in refused(folder, formats=["docx"])
    assert 'no engine "pandoc"' in refused(folder, engine="pandoc")
    assert "_quarto.yml cannot be read" in refused(folder / "nowhere")


def test_missing_packages_are_named(paper, monkeypatch):
    folder = paper("Text.\n")
    for name in ("typst", "pypandoc", "nbclient"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert f"needs the package {name}: pip install 'speedrun_nb[report]'" in refused(folder)
    blocked = ("import sys; sys.modules.update(dict.fromkeys(['typst', 'pypandoc', 'nbclient', 'nbformat'])); "
               "import speedrun_nb.render.render")
    assert subprocess.run([sys.executable, "-c", blocked], capture_output=True).returncode == 0


QUARTO = """
import os, sys
from pathlib import Path
if sys.argv[1:] == ["--version"]: sys.exit(print(os.environ.get("FAKE_VERSION", "1.9.38")))
render, name, to, form = sys.argv[1:]
assert (render, to) == ("render", "--to") and Path(name).is_file() and os.environ["QUARTO_PYTHON"]
output = Path("_output", name).with_suffix({"html": ".html", "typst": ".pdf"}[form])
output.parent.mkdir(exist_ok=True)
output.write_text("<p>" + os.environ.get("FAKE_TEXT", "Whole."))
print(os.environ.get("FAKE_WARNING", ""), file=sys.stderr)
sys.exit(int(os.environ.get("FAKE_EXIT", 0)))
"""


@pytest.fixture
def quarto(tmp_path, monkeypatch):
    "A stand-in for Quarto on the search path."
    folder = tmp_path / "bin with blanks"
    folder.mkdir()
    program = folder / "quarto"
    program.write_text(f"#!{sys.executable}\n{QUARTO}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder) + os.pathsep + os.environ["PATH"])
    monkeypatch.delenv("QUARTO_PATH", raising=False)
    return program


def test_quarto_is_used_where_it_is(paper, quarto, monkeypatch):
    folder = paper("Text.\n", "a paper; touch x.qmd")
    result = render(folder, ["a paper; touch x"])
    assert result.engine == "quarto 1.9.38"
    assert [path.name for path in result.outputs] == ["a paper; touch x.html", "a paper; touch x.pdf"]
    assert all(path.read_text() == "<p>Whole." for path in result.outputs)
    monkeypatch.setenv("FAKE_VERSION", "99.9.9")
    assert render(folder, ["a paper; touch x"], formats=["pdf"]).engine == "quarto 99.9.9"
    assert render(paper("Text.\n"), formats=["html"], engine="built-in").engine.startswith("built-in")


def test_quarto_too_old_or_missing(paper, quarto, monkeypatch):
    folder, told = paper("Text.\n"), []
    monkeypatch.setenv("FAKE_VERSION", "1.3.450")
    assert "is version 1.3.450; the papers need 1.5 or newer" in refused(folder, engine="quarto")
    assert render(folder, formats=["html"], progress=told.append).engine.startswith("built-in") and "1.3.450" in told[0]
    monkeypatch.setenv("QUARTO_PATH", str(folder / "nothing"))
    assert "is not a program" in refused(folder, engine="auto")


@pytest.mark.parametrize("name, value, expected", [
    ("FAKE_WARNING", "WARNING (main.lua:22) Unable to resolve crossref @fig-none", "@fig-none"),
    ("FAKE_WARNING", "[WARNING] Citeproc: citation nobody2020 not found", "nobody2020"),
    ("FAKE_TEXT", "See <strong>?@fig-none</strong>", "?@fig-none"),
    ("FAKE_TEXT", "<strong>?meta:titel</strong>", "?meta:titel"),
    ("FAKE_TEXT", "<img src='none.png'>", "none.png"),
    ("FAKE_EXIT", "1", "Quarto could not make paper.html"),
])
def test_quarto_leaves_no_holes(paper, quarto, monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    message = refused(paper("Text.\n"), engine="quarto")
    assert expected in message and message.startswith("paper.qmd: ")


# the papers of the studies, in every state that their runs can be in

@pytest.fixture
def papers(tmp_path, monkeypatch):
    "A copy of the papers, and an empty folder of runs that they read."
    monkeypatch.setenv("SPEEDRUN_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("SPEEDRUN_PROFILE", raising=False)
    source = PAPER.parents[1] / "paper"
    return Path(shutil.copytree(source, tmp_path / "paper", ignore=shutil.ignore_patterns("_output")))


def test_language_models_without_runs(papers):
    result = render(papers, ["nanogpt"], formats=["html"], engine="built-in")
    text = words(result.outputs[0].read_text(encoding="utf-8"))
    assert text.count("There are no runs of NanoGPT yet") >= 4
    assert "No runs yet." in text and "There are no runs in any profile yet." in text
    assert re.findall(r"Figure (\d+):", text) == [*"12345678"]
    assert [int(number) for number in re.findall(r"Table (\d+):", text)] == [*range(1, 23)]


def test_papers_of_a_profile_that_one_study_lacks(papers, monkeypatch):
    outputs = papers.parent / "outputs"
    simulated_runs(outputs, effects={"baseline": (0, 0)}, runs=2)
    effects = {"baseline": (0, 0), "kv_1": (-1, 0.05), "palm_parallel": (-2, 0.005)}
    for profile, runs in (("demo", 2), ("stage_a", 5)): simulated_runs(outputs, "gpt", profile, effects, runs=runs)
    monkeypatch.setenv("SPEEDRUN_PROFILE", "stage_a")
    made = {path.name: path for path in render(papers, ["cifar10", "nanogpt"], engine="built-in").outputs}
    cifar, gpt = (words(made[name].read_text(encoding="utf-8")) for name in ("cifar10.html", "nanogpt.html"))
    assert "no runs of CIFAR-10 in the profile stage_a" in cifar and "demo (2 runs)" in cifar
    for part in (
            "15 runs of 3 variants count here, in the profile stage_a, on the data set fineweb",
            "kv_1: refuted.",
            "palm_parallel: supported.",
            "demo (6 runs) and stage_a (15 runs)",
            "21 runs were made, none of which failed or diverged",
            "123.6 million weights",
            "1,000 steps of 128 sequences of 1,024 tokens",
            "Muon"):
        assert part in gpt, part
    assert made["nanogpt.pdf"].read_bytes().startswith(b"%PDF")
    monkeypatch.setenv("SPEEDRUN_PROFILE", "stage_x")
    assert 'no profile "stage_x". Did you mean "stage_' in refused(papers, "nanogpt")
