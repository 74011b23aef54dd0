from pathlib import Path

from tests.pages import models

DOCS = Path(__file__).parents[2] / "docs"

if __name__ == "__main__":
    (DOCS / "models.md").write_text(models.page(), encoding="utf-8")
