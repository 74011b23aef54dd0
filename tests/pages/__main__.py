from pathlib import Path

from tests.pages import models, support

DOCS = Path(__file__).parents[2] / "docs"

if __name__ == "__main__":
    for name, page in {"models": models.page, "support": support.page}.items():
        (DOCS / f"{name}.md").write_text(page(), encoding="utf-8")
