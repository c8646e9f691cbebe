"""axe: the accessibility rules of axe-core, run in a page as it stands.

Owns the call and which findings count. The rules themselves are a vendored script, which the page's own policy does not touch:
it comes in through the debugger.
"""

from pathlib import Path

SCRIPT = Path(__file__).parent / "vendor" / "axe.min.js"
SEVERE = ("serious", "critical")
RUN = """async (severe) => {
  const { violations } = await axe.run(document, { resultTypes: ["violations"] });
  return violations.filter(({ impact }) => severe.includes(impact)).flatMap(({ id, help, nodes }) =>
    nodes.map(({ html, any }) => `${id}: ${help}: ${html.slice(0, 160)}${any[0] ? ` (${any[0].message})` : ""}`));
}"""


def check_axe(page) -> None:
    """No serious or critical violation in what the page shows now."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(SCRIPT.read_text(encoding="utf-8"))
    found = page.evaluate(RUN, list(SEVERE))
    assert found == [], "axe-core found:\n" + "\n".join(found)
