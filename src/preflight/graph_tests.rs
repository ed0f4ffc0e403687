#![expect(clippy::unwrap_used, reason = "tests")]

use super::{MAX_DEPTH, check};

fn document(fragments: &str, body: &str) -> String {
    format!(
        "version 1.0;\n# a ; comment\nextension tract_registry tract_core;\n{fragments}\n\
         graph net(x) -> (y) {{\n  x = external<scalar>(shape = [B, 4]);\n  {body}\n}}\n"
    )
}

fn refusal(fragments: &str, body: &str) -> String {
    check(&document(fragments, body)).unwrap_err()
}

#[test]
fn graphs_as_people_write_them_pass() {
    let fragments = "fragment gelu<? = scalar>( x: tensor<?>, k: scalar = 1.0e-5 ) -> ( y: tensor<?> )\n{\n  \
         y = 0.5 * x * (1.0 + tract_core_erf(x * 0.707)); # \"unbalanced (\n}\n\
         fragment twice(x: tensor<scalar>, p: (integer, integer)[]) -> (y: tensor<scalar>) { y = gelu(gelu(x)); }\n\
         fragment tract_core_properties() -> (properties: (string, tensor<scalar>)[]) { properties = [(\"a (\", 'b'), \
         (\"c\", -1.0)]; }\nfragment bodiless(a: scalar) -> (b: scalar);";
    let body = "w = variable<scalar>(shape = [4, 4], label = \"twice/gelu.w\");\n\
         i\"a.b/c\" = twice(x, p = [(0, 0), (1, -1)]);\n\
         [p, q] = split(i\"a.b/c\", axis = 1, ratios = [1, 1]);\n\
         t = transpose(reshape(q, shape = [2, 2]), axes = [1, 0]);\n  y = (p + t <= w) == (-p != -3.0);";
    check(&document(fragments, body)).unwrap();
    check(&document(fragments, body).replace('\n', "\r\n")).unwrap();
    check("version 1.0;\ngraph i\"net.1\"(x) -> (x) { x = external<scalar>(shape = []); }").unwrap();
}

#[test]
fn depth_is_bounded_however_it_is_reached() {
    let around = MAX_DEPTH / 2;
    let chain = |n| format!("y = x{};", " + x".repeat(n));
    check(&document("", &chain(around))).unwrap();
    let nested = |n: usize| format!("y = {}x{};", "relu(".repeat(n), ")".repeat(n));
    check(&document("", &nested(12))).unwrap();
    for body in [
        chain(MAX_DEPTH),
        nested(MAX_DEPTH),
        nested(20_000),
        nested(40),
        format!("y = x{};", " in x".repeat(MAX_DEPTH)),
        format!("y = 1{};", "in1".repeat(MAX_DEPTH)),
        format!("y = x{};", "<=x".repeat(MAX_DEPTH)),
        format!("y = x{};", "==x".repeat(MAX_DEPTH)),
        format!("y = x{};", " < integer > x".repeat(MAX_DEPTH)),
        format!("y = {}x;", "-".repeat(100_000)),
        format!("y = {}x;", "- a + ".repeat(40)),
        format!("y = {}x{};", "-(".repeat(20), ")".repeat(20)),
        format!("{}y{} = x;", "[".repeat(300), "]".repeat(300)),
        format!("y = (((x){0}){0}){0};", " + x".repeat(100)),
    ] {
        assert!(check(&document("", &body)).is_err(), "{}", &body[..60.min(body.len())]);
    }
    // Its own graph is shallow, the fragments together are not.
    let link =
        |i: usize| format!("fragment f{i}(a: scalar) -> (b: scalar) {{ b = f{}(a{}); }}\n", i + 1, " + a".repeat(60));
    let links = |n| (0..n).map(link).collect::<String>();
    check(&document(&links(3), "y = f0(x);")).unwrap();
    assert!(refusal(&links(5), "y = f0(x);").contains("deep"));
}

#[test]
fn fragments_may_not_apply_themselves() {
    let fragment = |name: &str, body: &str| format!("fragment {name}(a: scalar) -> (b: scalar) {{ b = {body}; }}\n");
    for fragments in [
        fragment("f", "f(a)"),
        fragment("f", "f < scalar > # comment\n (a)"),
        fragment("f", "i\"f\"(a)"),
        fragment("f", "i'\\f'(a)"),
        fragment("f", "scan(a, body = \"f\")"),
        fragment("f", "g(a)") + &fragment("g", "relu(f(a))"),
        fragment("i\"f\"", "f(a)"),
        fragment("f", "a") + &fragment("f", "f(a)"),
    ] {
        assert!(refusal(&fragments, "y = f(x);").contains("applies itself"), "{fragments}");
    }
    // Through operator signs and tract's own fragments.
    assert!(refusal(&fragment("add", "a + a"), "y = x + x;").contains("redefines"));
    assert!(refusal(&fragment("max", "relu(a)"), "y = relu(x);").contains("redefines"));
    // A variable of the same name is no application.
    check(&document(&fragment("f", "relu(a)").replace("b = ", "f = "), "y = f(x);")).unwrap();
}

#[test]
fn the_body_of_a_scan_is_a_fragment_of_the_file() {
    let step = "fragment step(x: tensor<scalar>, h: tensor<scalar>) -> (next: tensor<scalar>) { next = x + h; }\n";
    let scan = |body: &str| {
        format!(
            "[y, last] = tract_core_scan({body}, [(\"x\", x, 0, 1)], [], [(\"h\", x, \"next\")], \
             [(\"next\", \"full\", 0, 1), (\"next\", \"last\", 0, 1)]);"
        )
    };
    for body in ["\"step\"", "body = \"step\"", "\"st\\ep\""] {
        check(&document(step, &scan(body))).unwrap();
    }
    for body in ["\"stop\"", "body = \"stop\"", "# comment\n \"stop\""] {
        let why = refusal(step, &scan(body));
        assert!(why.contains("no fragment \"stop\""), "{why}");
    }
    let inner = |name: &str, body: &str| {
        format!("fragment {name}(x: tensor<scalar>) -> (y: tensor<scalar>) {{ {} }}\n", scan(body))
    };
    assert!(refusal(&inner("a", "\"a\""), &scan("\"a\"")).contains("applies itself"));
    let cycle = inner("a", "\"b\"") + &inner("b", "body = \"a\"");
    assert!(refusal(&cycle, &scan("\"a\"")).contains("applies itself"));
    // A scan in a fragment nobody applies is looked at too, and what bodies hold is counted.
    assert!(refusal(&inner("a", "\"stop\""), "y = x;").contains("no fragment"));
    let double = |i: usize| {
        format!("fragment f{i}(a: scalar) -> (b: scalar) {{ b = scan(a, \"f{0}\"); c = f{0}(b); }}\n", i + 1)
    };
    assert!(refusal(&(0..40).map(double).collect::<String>(), &scan("\"f0\"")).contains("operations"));
}

#[test]
fn what_fragments_multiply_into_is_bounded() {
    let double = |i: usize| format!("fragment f{i}(a: scalar) -> (b: scalar) {{ b = f{0}(a); c = f{0}(b); }}\n", i + 1);
    let fragments: String = (0..40).map(double).collect();
    assert!(refusal(&fragments, "y = f0(x);").contains("operations"));
}

#[test]
fn quotes_and_comments_hide_nothing() {
    let deep = format!("y = {}x{};", "(".repeat(400), ")".repeat(400));
    for body in [
        format!("# \"\n {deep}"),
        format!("# '\r {deep} # '"),
        format!("a = \"\\\"\"; {deep} # \""),
        format!("a = \"#\"; {deep}"),
        format!("a = i\"#\"; {deep}"),
        format!("a = \"'\"; {deep} # '"),
    ] {
        assert!(check(&document("", &body)).is_err(), "{body}");
    }
    for header in [
        "version 1.0;\nextension foo \"((;\n",
        "version 1.0;\nextension # ; graph g(a) -> (b) { c = \"\n foo \";\n",
        "version # ;\n 1.0;",
        "version 1.0;extension foo#;\"\n;",
    ] {
        let text = format!("{header}graph net(x) -> (y) {{ {deep} }}");
        assert!(check(&text).is_err(), "{header}");
    }
}

#[test]
fn what_makes_tract_loop_or_allocate_without_end_is_refused() {
    for body in [
        "y = transpose(x, axes = [0, 0]);",
        "y = transpose(x, [0, 1, 0]);",
        "y = tile(x, repeats = [100000000, 1]);",
        "y = pad(x, padding = [(0, 1000000000), (0, 0)], value = 0.0);",
    ] {
        let why = refusal("", body);
        assert!(why.starts_with("line 7: "), "{why}");
    }
    check(&document("", "y = pad(x, padding = [(0, 9), (9, 0)], value = -1000000000);")).unwrap();
}

#[test]
fn texts_that_are_no_graph_are_refused() {
    for text in [
        "",
        "graph",
        "version 1.0",
        "version 1.0;\nnet(x)",
        "version 1.0;\ngraph net(x)) {}",
        "version 1.0;\ngraph net(x {",
    ] {
        assert!(check(text).is_err(), "{text}");
    }
}
