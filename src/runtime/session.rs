//! Runs that carry values from one to the next: the caches of a language model, the state of a stream.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use tract_nnef::internal::{IntoTValue, SymbolValues, TDim, Tensor, TractResult, TypedFact};

use super::{Array, Fact, Input, Model, guarded, inputs, invalid};
use crate::error::{Error, Result};

/// A model some of whose inputs have the value that an output had in the run before. For one thread at a time.
#[derive(Debug)]
pub struct Session {
    model: Arc<Model>,
    /// Index of an input, index of the output that is its value in the next run.
    carried: Vec<(usize, usize)>,
    /// Of each input of the model its value, if it is carried.
    state: Mutex<Vec<Option<Array>>>,
}

impl Session {
    /// `carried`: names of inputs, each with the output it takes its value from. They begin as zeros of a shape whose
    /// symbols are 0: caches are empty.
    pub fn new(model: Arc<Model>, carried: &[(String, String)]) -> Result<Self> {
        let mut indices: Vec<(usize, usize)> = Vec::with_capacity(carried.len());
        for (input, output) in carried {
            let (to, from) = (place(&model.inputs, "input", input)?, place(&model.outputs, "output", output)?);
            if indices.iter().any(|&(other, _)| other == to) {
                return invalid(format!("input {input:?} is carried twice"));
            }
            let (source, target) = (&model.outputs[from], &model.inputs[to]);
            if source.dtype != target.dtype || source.shape.len() != target.shape.len() {
                return invalid(format!("output {source} cannot be carried to input {target}"));
            }
            indices.push((to, from));
        }
        let state = Mutex::new(beginning(&model, &indices)?);
        Ok(Self { model, carried: indices, state })
    }

    /// Inputs that [`Self::run`] takes, in order: those not carried.
    pub fn inputs(&self) -> Vec<&Fact> {
        let free = |&(at, _): &(usize, &Fact)| !self.carried.iter().any(|&(input, _)| input == at);
        self.model.inputs.iter().enumerate().filter(free).map(|(_, fact)| fact).collect()
    }

    /// Outputs that [`Self::run`] gives, in order: those not carried.
    pub fn outputs(&self) -> Vec<&Fact> {
        self.model.outputs.iter().enumerate().filter(|&(at, _)| self.is_given(at)).map(|(_, fact)| fact).collect()
    }

    /// One run on what is carried; if it fails, that stays as it was.
    pub fn run(&self, inputs: &[Input<'_>]) -> Result<Vec<Array>> {
        self.run_until(&|| false, inputs)
    }

    /// As [`Model::run_until`].
    pub fn run_until(&self, stop: &dyn Fn() -> bool, inputs: &[Input<'_>]) -> Result<Vec<Array>> {
        let mut state = self.lock()?;
        let outputs = self.model.run_with(&state, stop, inputs)?;
        for &(input, output) in &self.carried {
            state[input] = Some(outputs[output].clone());
        }
        Ok(outputs.into_iter().enumerate().filter(|&(at, _)| self.is_given(at)).map(|(_, value)| value).collect())
    }

    /// Begins anew.
    pub fn reset(&self) -> Result<()> {
        *self.lock()? = beginning(&self.model, &self.carried)?;
        Ok(())
    }

    /// What is carried, by name of the input.
    pub fn state(&self) -> Result<Vec<(String, Array)>> {
        let state = self.lock()?;
        let named = self.model.inputs.iter().zip(state.iter());
        Ok(named.filter_map(|(fact, value)| Some((fact.name.clone(), value.clone()?))).collect())
    }

    /// Puts `values`, by name of the input, in place of all that is carried.
    pub fn load_state(&self, values: &[(String, Input<'_>)]) -> Result<()> {
        let mut state = self.lock()?;
        let mut given = Vec::with_capacity(values.len());
        for (name, input) in values {
            let index = place(&self.model.inputs, "input", name)?;
            if state[index].is_none() {
                return invalid(format!("input {name:?} is not carried"));
            }
            given.push((index, *input));
        }
        if let Some((missing, _)) = self.carried.iter().find(|(at, _)| !given.iter().any(|(index, _)| index == at)) {
            return invalid(format!("the state lacks {:?}", self.model.inputs[*missing].name));
        }
        inputs::check(self.model.plan.model(), &self.model.inputs, &given)?;
        let loaded = guarded(&"loading a state", &AtomicBool::new(false), || {
            given
                .iter()
                .map(|(index, input)| Ok((*index, self.model.array(*index, input)?)))
                .collect::<TractResult<Vec<_>>>()
        })?;
        for (index, value) in loaded {
            state[index] = Some(value);
        }
        Ok(())
    }

    fn is_given(&self, output: usize) -> bool {
        !self.carried.iter().any(|&(_, carried)| carried == output)
    }

    fn lock(&self) -> Result<MutexGuard<'_, Vec<Option<Array>>>> {
        match self.state.try_lock() {
            Ok(state) => Ok(state),
            // Nothing is written before all of it can be.
            Err(TryLockError::Poisoned(state)) => Ok(state.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(Error::Misuse("the session is in use by another thread; make one for each".to_owned()))
            }
        }
    }
}

fn place(facts: &[Fact], side: &str, name: &str) -> Result<usize> {
    facts.iter().position(|fact| fact.name == name).map_or_else(
        || {
            let known: Vec<_> = facts.iter().map(|fact| fact.name.as_str()).collect();
            invalid(format!("{name:?} is no {side} of the model; it has {}", known.join(", ")))
        },
        Ok,
    )
}

fn beginning(model: &Model, carried: &[(usize, usize)]) -> Result<Vec<Option<Array>>> {
    guarded(&"beginning a session", &AtomicBool::new(false), || {
        let mut state = vec![None; model.inputs.len()];
        for &(input, _) in carried {
            state[input] = Some(Array::new(
                zeros(model.plan.model().input_fact(input)?)?.into_tvalue(),
                &SymbolValues::default(),
            )?);
        }
        Ok(state)
    })
}

fn zeros(fact: &TypedFact) -> TractResult<Tensor> {
    let mut empty = SymbolValues::default();
    for symbol in fact.shape.iter().flat_map(TDim::symbols) {
        empty.set(&symbol, 0);
    }
    Tensor::zero_dt(fact.datum_type, &fact.shape.eval_to_usize(&empty)?)
}
