//! The 32 likeliest tokens after those given: `generate model/model.nnef.tgz 504 3575 282 4649 314`

use std::io::Write;

use tract_nnef::internal::{
    DimLike, Framework, IntoRunnable, IntoTValue, Tensor, TractErrorContext, TractResult, TypedFact,
};
use tract_transformers::WithTractTransformers;

fn main() -> TractResult<()> {
    let mut args = std::env::args().skip(1);
    let archive = args.next().context("give an archive, then the tokens of a text")?;
    let mut ids = args.map(|id| Ok(id.parse()?)).collect::<TractResult<Vec<i64>>>()?;
    let nnef = tract_nnef::nnef().with_tract_transformers();
    let model = nnef.model_for_path(archive)?.into_optimized()?;
    // No past yet: P, the only symbol in the shape of a cache, is 0.
    let empty = |input| {
        let fact: &TypedFact = model.outlet_fact(input)?;
        let shape: Vec<usize> = fact.shape.iter().map(|dim| dim.to_usize().unwrap_or(0)).collect();
        Ok(Tensor::zero_dt(fact.datum_type, &shape)?.into_tvalue())
    };
    let mut caches = model.inputs[1..].iter().copied().map(empty).collect::<TractResult<Vec<_>>>()?;
    let plan = model.into_runnable()?;
    let mut stdout = std::io::stdout().lock();
    for _ in 0..32 {
        let tokens = Tensor::from_shape(&[1, ids.len()], &ids)?.into_tvalue();
        let outputs = plan.run(std::iter::once(tokens).chain(caches).collect())?;
        let logits = outputs[0].cast_to::<f32>()?;
        let logits = logits.try_as_plain_ram()?.as_slice::<f32>()?.iter().enumerate();
        let (best, _) = logits.max_by(|a, b| a.1.total_cmp(b.1)).context("no logits")?;
        writeln!(stdout, "{best}")?;
        ids = vec![best as i64];
        caches = outputs.into_iter().skip(1).collect();
    }
    Ok(())
}
