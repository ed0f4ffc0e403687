import pytest

GRAPH = """version 1.0;
extension tract_registry tract_core;
extension tract_symbol B;

graph network(x, bias) -> (doubled, y)
{
    x = external<scalar>(shape = [B, 3]);
    bias = external<scalar>(shape = [3]);
    doubled = mul(x, 2.0);
    positive = relu(doubled);
    turned = transpose(positive, axes = [1, 0]);
    shift = unsqueeze(bias, axes = [0]);
    y = add(positive, shift);
}
"""


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """`doubled = 2 x`, `y = relu(2 x) + bias` for x [B, 3]."""
    folder = tmp_path_factory.mktemp("archive") / "model"
    folder.mkdir()
    (folder / "graph.nnef").write_text(GRAPH)
    return folder
