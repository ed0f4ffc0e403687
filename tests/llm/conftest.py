import pytest
from trained import export, form_of


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """`(method, logits) -> folder` of the trained model; made once, only to be read."""
    made = {}

    def folder(method=None, logits=1):
        if (method, logits) not in made:
            made[method, logits] = export(form_of(method), tmp_path_factory.mktemp("llm") / "out", logits)
        return made[method, logits]

    return folder
