//! What graph.nnef asks of tract's recursive parser and loader, found without recursion.
//!
//! tract 0.23.9 parses everything between two brackets, or after an unary operator, twice: the time doubles with each
//! level. It wires an expression by recursion over its brackets and its operators (`a+b+c` is two deep), through the
//! bodies of the fragments it applies, without a look at cycles. Measured with a stack of 64 MiB: a depth of 1344 (64
//! fragments of 20 operators) loads; a unit of work below takes about 4 µs.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

/// Brackets and operators around an expression, those of the fragments around it included.
const MAX_DEPTH: usize = 256;
/// Tokens that tract's parser visits, those in brackets twice a level.
const MAX_WORK: u64 = 1 << 23;
/// Operations once fragments are expanded; tract's time to name them grows with their square.
const MAX_OPERATIONS: u64 = 100_000;
/// Literal amount in `pad` and `tile`, whose outputs tract allocates without a question.
const MAX_AMOUNT: i64 = 1 << 24;

/// Bytes of an extension; products and brackets in it, which tract multiplies out when it is an assertion.
const MAX_EXTENSION: usize = 4096;
const MAX_PRODUCTS: usize = 32;

/// Applies a fragment, named in a string, to every step of a tensor.
const SCAN: &str = "tract_core_scan";

/// Operators that tract calls by name from operator signs and from its own fragments: redefining one can make a cycle.
#[rustfmt::skip] // one name a line would take a page
pub const RESERVED: &[&str] = &[
    "abs", "add", "add_n", "avg_pool", "box", "ceil", "clamp", "constant", "conv", "debox", "deconv", "div", "eq",
    "exp", "ge", "gt", "integer", "le", "length_of", "local_mean_normalization", "local_variance_normalization", "log",
    "log2", "lt", "matmul", "max", "max_pool", "max_pool_with_index", "mean_reduce", "min", "min_max_linear_quantize",
    "mul", "ne", "pow", "prelu", "range_of", "roi_resample", "round", "scalar", "select", "sign", "sqr", "sqrt", "sub",
    "sum_reduce",
];

type Checked<T> = Result<T, String>;

/// `Err(why)` if tract could crash or hang on `text`; a text that is merely not NNEF may pass.
pub fn check(text: &str) -> Checked<()> {
    let body = skip_header(text)?;
    let mut scan = Scan { text, at: text.len() - body.len(), ..Scan::default() };
    let definitions = scan.definitions().map_err(|why| {
        let line = text[..scan.at].matches('\n').count() + 1;
        format!("line {line}: {why}")
    })?;
    expand(&definitions)
}

/// What follows `version X;` and the extensions, whose text up to `;` has no grammar.
fn skip_header(text: &str) -> Checked<&str> {
    let malformed = || "it must begin with `version 1.0;` and its extensions".to_owned();
    let version = skip_space(text).strip_prefix("version").ok_or_else(malformed)?;
    let (number, mut rest) = version.split_once(';').ok_or_else(malformed)?;
    if !number.chars().all(|c| c.is_ascii_digit() || c == '.' || is_space(c)) {
        return Err(malformed());
    }
    loop {
        rest = skip_space(rest);
        let Some(extension) = rest.strip_prefix("extension") else { return Ok(rest) };
        // Spaces and comments are passed where tract passes them, since a comment may hold a `;`.
        let argument = skip_space(extension).trim_start_matches(is_name_char);
        let (said, after) = skip_space(argument).split_once(';').ok_or_else(malformed)?;
        if said.len() > MAX_EXTENSION || said.matches(['*', '^', '(']).count() > MAX_PRODUCTS {
            return Err(format!("an extension of more than {MAX_EXTENSION} bytes or {MAX_PRODUCTS} products"));
        }
        rest = after;
    }
}

fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn skip_space(mut text: &str) -> &str {
    loop {
        text = text.trim_start_matches(is_space);
        let Some(comment) = text.strip_prefix('#') else { return text };
        text = comment.trim_start_matches(|c| !matches!(c, '\n' | '\r'));
    }
}

/// A fragment or the graph.
#[derive(Default)]
struct Definition<'a> {
    name: Cow<'a, str>,
    /// Deepest expression.
    depth: usize,
    operations: u64,
    /// What its body applies or names in a string (the body of a scan), and how often.
    names: BTreeMap<Cow<'a, str>, u64>,
    /// Fragments that its scans name as their bodies.
    scanned: Vec<Cow<'a, str>>,
}

/// An open bracket.
#[derive(Default)]
struct Level<'a> {
    /// Where its content begins.
    start: usize,
    brace: bool,
    /// What the bracket holds the arguments of.
    applied: &'a str,
    /// Operators of the current item, and those of them that have one operand.
    operators: usize,
    unary: u32,
    /// Depth of the deepest bracket in the current item, and of the deepest item.
    inner: usize,
    deepest: usize,
}

impl Level<'_> {
    fn end_item(&mut self) {
        self.deepest = self.deepest.max(self.operators + self.inner);
        (self.operators, self.unary, self.inner) = (0, 0, 0);
    }
}

/// A walk over the tokens of a text.
#[derive(Default)]
struct Scan<'a> {
    text: &'a str,
    at: usize,
    levels: Vec<Level<'a>>,
    definitions: Vec<Definition<'a>>,
    work: u64,
    /// The last token, if a name; whether it ended an operand.
    name: &'a str,
    operand: bool,
}

impl<'a> Scan<'a> {
    fn definitions(&mut self) -> Checked<Vec<Definition<'a>>> {
        loop {
            self.at = self.text.len() - skip_space(&self.text[self.at..]).len();
            let Some(c) = self.text[self.at..].chars().next() else { break };
            let name = std::mem::take(&mut self.name);
            match c {
                '(' | '[' | '{' => self.open(c == '{', if c == '(' { name } else { "" }),
                ')' | ']' | '}' => self.close()?,
                '"' | '\'' => self.string()?,
                'a'..='z' | 'A'..='Z' | '_' => self.identifier()?,
                _ => self.sign(c, name)?,
            }
            self.limit()?;
        }
        if self.levels.is_empty() {
            Ok(std::mem::take(&mut self.definitions))
        } else {
            Err("an open bracket".to_owned())
        }
    }

    fn limit(&mut self) -> Checked<()> {
        let doublings: u32 = self.levels.iter().map(|level| u32::from(!level.brace) + level.unary).sum();
        self.work = self.work.saturating_add(1u64.checked_shl(doublings).unwrap_or(u64::MAX));
        let deepest = self.levels.last().map_or(0, |level| level.operators + level.inner);
        if self.levels.len() + deepest > MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} brackets and operators inside each other"));
        }
        if self.work > MAX_WORK {
            return Err("it is nested so deep that tract would take hours to parse it".to_owned());
        }
        Ok(())
    }

    fn open(&mut self, brace: bool, applied: &'a str) {
        self.at += 1;
        if !applied.is_empty() {
            self.count(Cow::Borrowed(applied));
        }
        self.levels.push(Level { start: self.at, brace, applied, ..Level::default() });
        self.operand = false;
    }

    fn close(&mut self) -> Checked<()> {
        let mut level = self.levels.pop().ok_or("a closing bracket without an opening one")?;
        level.end_item();
        self.check_amounts(&self.text[level.start..self.at])?;
        match (self.levels.last_mut(), self.definitions.last_mut()) {
            (Some(outer), _) => outer.inner = outer.inner.max(1 + level.deepest),
            (None, Some(definition)) => definition.depth = definition.depth.max(1 + level.deepest),
            (None, None) => {}
        }
        self.at += 1;
        self.operand = true;
        Ok(())
    }

    /// `items` are those of the bracket that closes inside the remaining ones.
    fn check_amounts(&self, items: &str) -> Checked<()> {
        let mut around = self.levels.iter().rev().map(|level| level.applied);
        let (parent, grandparent) = (around.next().unwrap_or(""), around.next().unwrap_or(""));
        if !matches!(parent, "transpose" | "tile") && grandparent != "pad" {
            return Ok(());
        }
        let numbers: Vec<i64> = items.split(',').filter_map(|item| item.trim().parse().ok()).collect();
        if parent == "transpose" && numbers.iter().enumerate().any(|(i, axis)| numbers[..i].contains(axis)) {
            return Err(format!("transpose with an axis twice: [{items}]"));
        }
        if parent != "transpose" && numbers.iter().any(|&n| n > MAX_AMOUNT) {
            return Err(format!("an amount above {MAX_AMOUNT}: [{items}]"));
        }
        Ok(())
    }

    fn string(&mut self) -> Checked<()> {
        let start = self.at + 1;
        let quote = self.text.as_bytes()[self.at];
        let mut escaped = false;
        let length = self.text[start..].bytes().position(|b| {
            let ends = !escaped && matches!(b, b'"' | b'\'');
            escaped = !escaped && b == b'\\';
            ends
        });
        let end = start + length.ok_or("a string without its end")?;
        if self.text.as_bytes()[end] != quote {
            return Err("a quote of the other kind inside a string, where tract wants a backslash before it".to_owned());
        }
        self.at = end + 1;
        self.operand = true;
        let raw = &self.text[start..end];
        let text = if raw.contains('\\') { Cow::Owned(unescape(raw)) } else { Cow::Borrowed(raw) };
        // The other strings of a scan are in its tuples.
        if self.levels.last().is_some_and(|level| level.applied == SCAN)
            && let Some(definition) = self.definitions.last_mut()
        {
            definition.scanned.push(text.clone());
        }
        self.named(text)
    }

    fn identifier(&mut self) -> Checked<()> {
        let rest = &self.text[self.at..];
        let token = &rest[..rest.find(|c| !is_name_char(c)).unwrap_or(rest.len())];
        self.at += token.len();
        if token == "i" && self.text[self.at..].starts_with(['"', '\'']) {
            return self.string();
        }
        self.operand = true;
        if self.levels.is_empty() {
            return self.named(Cow::Borrowed(token));
        }
        self.name = token;
        if let Some(level) = self.levels.last_mut() {
            // The operator `in` needs no space around it: `1in2in3`.
            level.operators += token.matches("in").count();
        }
        Ok(())
    }

    /// A name outside brackets begins a definition; inside, it may be that of a fragment.
    fn named(&mut self, name: Cow<'a, str>) -> Checked<()> {
        if !self.levels.is_empty() {
            self.count(name);
            return Ok(());
        }
        match self.definitions.last_mut() {
            Some(definition) if definition.name.is_empty() => {
                if RESERVED.contains(&&*name) {
                    return Err(format!("it redefines the operator {name}, which tract's own definitions use"));
                }
                definition.name = name;
            }
            _ if matches!(&*name, "fragment" | "graph") => self.definitions.push(Definition::default()),
            _ => return Err(format!("`fragment` or `graph` expected, not {name:?}")),
        }
        Ok(())
    }

    fn count(&mut self, name: Cow<'a, str>) {
        if let Some(definition) = self.definitions.last_mut() {
            definition.operations += 1;
            *definition.names.entry(name).or_default() += 1;
        }
    }

    fn sign(&mut self, c: char, name: &'a str) -> Checked<()> {
        let rest = &self.text[self.at..];
        if c == '<'
            && let Some(after) = after_generic(rest)
        {
            self.at = self.text.len() - after.len();
            self.name = name;
            if let Some(level) = self.levels.last_mut() {
                level.operators += 2; // a comparison of comparisons, if no arguments follow
            }
            return Ok(());
        }
        let next = rest[c.len_utf8()..].chars().next();
        let pair = matches!(c, '=' | '!' | '<' | '>') && next == Some('=');
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        self.at += number.max(c.len_utf8() + usize::from(pair));
        let Some(level) = self.levels.last_mut() else {
            return if matches!(c, '-' | '>' | ';') { Ok(()) } else { Err(format!("unexpected {c:?}")) };
        };
        let negative = c == '-' && !self.operand && next.is_some_and(|c| c.is_ascii_digit());
        if number > 0 {
            self.operand = true;
        } else if !pair && matches!(c, ',' | ';' | '=') {
            level.end_item();
            self.operand = false;
        } else if !negative {
            level.operators += 1;
            level.unary += u32::from(!self.operand);
            self.operand = false;
            if let Some(definition) = self.definitions.last_mut() {
                definition.operations += 1;
            }
        }
        Ok(())
    }
}

/// What follows `<scalar>` (between an operator and its arguments) or `<? = scalar>` (in a declaration).
fn after_generic(text: &str) -> Option<&str> {
    let (inside, after) = text.strip_prefix('<')?.split_once('>')?;
    let inside = inside.trim_matches(is_space);
    let inside = inside.strip_prefix('?').map_or(inside, |rest| rest.trim_start_matches(|c| c == '=' || is_space(c)));
    matches!(inside, "" | "?" | "integer" | "scalar" | "logical" | "string").then_some(after)
}

fn unescape(raw: &str) -> String {
    let mut chars = raw.chars();
    std::iter::from_fn(|| chars.next().and_then(|c| if c == '\\' { chars.next() } else { Some(c) })).collect()
}

/// Refuses scans without a body, cycles between fragments, and what grows too deep or too large when they are expanded.
fn expand(definitions: &[Definition]) -> Checked<()> {
    let mut by_name: HashMap<&str, Vec<usize>> = HashMap::new();
    for (index, definition) in definitions.iter().enumerate() {
        by_name.entry(&definition.name).or_default().push(index);
    }
    for definition in definitions {
        if let Some(body) = definition.scanned.iter().find(|body| !by_name.contains_key(&***body)) {
            return Err(format!("{}: there is no fragment {body:?} for the body of a scan", definition.name));
        }
    }
    let mut expansion = Expansion { definitions, by_name, sizes: vec![Size::Unknown; definitions.len()] };
    (0..definitions.len()).try_for_each(|index| expansion.size(index, 0).map(drop))
}

#[derive(Clone, Copy)]
enum Size {
    Unknown,
    /// Being computed: met again, it is part of a cycle.
    Open,
    Known {
        depth: usize,
        operations: u64,
    },
}

struct Expansion<'a> {
    definitions: &'a [Definition<'a>],
    by_name: HashMap<&'a str, Vec<usize>>,
    sizes: Vec<Size>,
}

impl Expansion<'_> {
    /// Depth and operations of a definition, fragments expanded; it is applied `around` others deep.
    fn size(&mut self, index: usize, around: usize) -> Checked<(usize, u64)> {
        let definition = &self.definitions[index];
        let name = &definition.name;
        match self.sizes[index] {
            Size::Known { depth, operations } => return Ok((depth, operations)),
            Size::Open => return Err(format!("fragment {name} applies itself, directly or through others")),
            Size::Unknown => self.sizes[index] = Size::Open,
        }
        let (mut inner, mut operations) = (0, definition.operations);
        for (applied, &times) in &definition.names {
            for callee in self.by_name.get(&**applied).cloned().unwrap_or_default() {
                if around > MAX_DEPTH {
                    return Err(format!("more than {MAX_DEPTH} fragments apply each other, down to {name}"));
                }
                let (depth, each) = self.size(callee, around + 1)?;
                inner = inner.max(depth);
                operations = operations.saturating_add(each.saturating_mul(times));
            }
        }
        let depth = definition.depth + inner;
        if depth > MAX_DEPTH {
            return Err(format!("{name} is more than {MAX_DEPTH} expressions deep, fragments included"));
        }
        if operations > MAX_OPERATIONS {
            return Err(format!("{name} has more than {MAX_OPERATIONS} operations, fragments expanded"));
        }
        self.sizes[index] = Size::Known { depth, operations };
        Ok((depth, operations))
    }
}

#[cfg(test)]
#[path = "graph_tests.rs"]
mod tests;
