//! The NNEF `.dat` tensor file: a 128-byte little-endian header, then the items.
//!
//! | offset | field |
//! |---|---|
//! | 0 | magic `4e ef`, version 1.0 |
//! | 4 | u32 payload bytes |
//! | 8 | u32 rank, then 8 u32 dimensions |
//! | 44 | u32 bits an item (`ffffffff` for Q40), u16 item type, u16 vendor |
//! | 52 | 76 bytes: deprecated parameters and padding, written as zeros, not read |
//!
//! Sources: NNEF 1.0.5 section "Tensor file format"; tract's `tract_nnef::tensors` for the vendor types.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

mod payload;

pub use payload::{Exactly, Q40Planes};

use crate::error::{Error, Result};
use crate::fsio::AtomicFile;
use crate::q40::GROUP_SIZE;
use crate::q40::block::BLOCK_BYTES;

/// Bytes of an encoded [`Header`].
pub const HEADER_LEN: usize = 128;
/// Bytes written at a time.
pub const COPY_LEN: usize = 1 << 20;
const MAGIC_AND_VERSION: [u8; 4] = [0x4e, 0xef, 1, 0];
const MAX_RANK: usize = 8;
const VENDOR_TRACT: u16 = u16::from_be_bytes(*b"TR");
const ITEM_Q40: u16 = 0x3040;

/// What a `.dat` holds, by its tract name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum DatType {
    F16,
    F32,
    F64,
    U8,
    U16,
    U32,
    U64,
    I8,
    I16,
    I32,
    I64,
    /// One byte an item.
    Bool,
    /// GGUF `Q4_0` blocks: 32 elements in 18 bytes.
    Q40,
}

impl DatType {
    /// Every type, in the order of the enum.
    pub const ALL: [Self; 13] = [
        Self::F16,
        Self::F32,
        Self::F64,
        Self::U8,
        Self::U16,
        Self::U32,
        Self::U64,
        Self::I8,
        Self::I16,
        Self::I32,
        Self::I64,
        Self::Bool,
        Self::Q40,
    ];

    /// The name Python and tract use: `"f32"`, `"bool"`, `"q40"`...
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::U8 => "u8",
            Self::U16 => "u16",
            Self::U32 => "u32",
            Self::U64 => "u64",
            Self::I8 => "i8",
            Self::I16 => "i16",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::Bool => "bool",
            Self::Q40 => "q40",
        }
    }

    /// Inverse of [`Self::name`].
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            Error::InvalidArgument(format!("a .dat cannot hold dtype {name:?}; it can hold {known}"))
        })
    }

    /// `(item type, bits an item, vendor)` as written; integers use the plain types 1 and 4 of the specification.
    fn code(self) -> (u16, u32, u16) {
        match self {
            Self::F16 => (0, 16, 0),
            Self::F32 => (0, 32, 0),
            Self::F64 => (0, 64, 0),
            Self::U8 => (1, 8, 0),
            Self::U16 => (1, 16, 0),
            Self::U32 => (1, 32, 0),
            Self::U64 => (1, 64, 0),
            Self::I8 => (4, 8, 0),
            Self::I16 => (4, 16, 0),
            Self::I32 => (4, 32, 0),
            Self::I64 => (4, 64, 0),
            Self::Bool => (5, 8, 0),
            Self::Q40 => (ITEM_Q40, u32::MAX, VENDOR_TRACT),
        }
    }

    /// Inverse of [`Self::code`]; also takes the quantized integer types 2 and 3, under which tract stores plain ones.
    fn from_code(item_type: u16, bits: u32, vendor: u16) -> Option<Self> {
        let item_type = match (vendor, item_type) {
            (0, 2) => 1,
            (0, 3) => 4,
            _ => item_type,
        };
        Self::ALL.into_iter().find(|t| t.code() == (item_type, bits, vendor))
    }
}

/// A header that the format can say and tract can read; there is no other way to hold one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    dtype: DatType,
    dims: Vec<u32>,
    payload_len: u32,
}

impl Header {
    /// The header of a tensor of `shape`.
    ///
    /// Refuses what the format cannot say: rank above 8, a dimension or a payload of 4 GiB or more, booleans without
    /// an element (tract rejects those), and for Q40 ranks below 2 or rows that are not whole groups of 32.
    pub fn new(dtype: DatType, shape: &[usize]) -> Result<Self> {
        let refuse =
            |why: &str| Error::InvalidArgument(format!("a .dat of {} with shape {shape:?}: {why}", dtype.name()));
        if shape.len() > MAX_RANK {
            return Err(refuse("NNEF tensors have at most 8 dimensions"));
        }
        let dims: Vec<u32> = shape
            .iter()
            .map(|&d| u32::try_from(d))
            .collect::<std::result::Result<_, _>>()
            .map_err(|_| refuse("a dimension is 2^32 or more"))?;
        let count = |dims: &[u32]| dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d.into()));
        let len = count(&dims).ok_or_else(|| refuse("the number of elements overflows"))?;
        let payload_len = if dtype == DatType::Q40 {
            let row = dims.get(1..).filter(|rest| !rest.is_empty()).and_then(count);
            if row.is_none_or(|row| row % GROUP_SIZE as u64 != 0) {
                let why = "Q40 needs rank >= 2 and a multiple of 32 elements for each index of the first dimension";
                return Err(Error::ImpossibleQuantization(format!("shape {shape:?}: {why}")));
            }
            (len / GROUP_SIZE as u64).checked_mul(BLOCK_BYTES as u64)
        } else {
            len.checked_mul((dtype.code().1 / 8).into())
        };
        let payload_len = payload_len
            .and_then(|n| u32::try_from(n).ok())
            .ok_or_else(|| refuse("its payload is 4 GiB or more, the format's limit; split the tensor"))?;
        if dtype == DatType::Bool && len == 0 {
            return Err(refuse("tract cannot read booleans without an element"));
        }
        Ok(Self { dtype, dims, payload_len })
    }

    /// Type of the items.
    pub fn dtype(&self) -> DatType {
        self.dtype
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> Vec<usize> {
        self.dims.iter().map(|&d| d as usize).collect()
    }

    /// Bytes that follow the header.
    pub fn payload_len(&self) -> u64 {
        self.payload_len.into()
    }

    /// Whether its payload may hold `bytes`: of booleans, 0 and 1.
    pub fn admits(&self, bytes: &[u8]) -> bool {
        self.dtype != DatType::Bool || bytes.iter().all(|&byte| byte < 2)
    }

    /// Bytes of the whole file.
    pub fn file_len(&self) -> u64 {
        self.payload_len() + HEADER_LEN as u64
    }

    /// The header as it is on disk.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let (item_type, bits, vendor) = self.dtype.code();
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&MAGIC_AND_VERSION);
        bytes[4..8].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes[8..12].copy_from_slice(&(self.dims.len() as u32).to_le_bytes());
        for (slot, dim) in bytes[12..44].chunks_exact_mut(4).zip(&self.dims) {
            slot.copy_from_slice(&dim.to_le_bytes());
        }
        bytes[44..48].copy_from_slice(&bits.to_le_bytes());
        bytes[48..50].copy_from_slice(&item_type.to_le_bytes());
        bytes[50..52].copy_from_slice(&vendor.to_le_bytes());
        bytes
    }

    /// Reads a header back; [`Error::InconsistentTensor`] unless it is one [`Self::new`] could have made (integers may
    /// also be typed as tract does).
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let refuse = |why: String| Err(Error::InconsistentTensor(format!("not a readable .dat header: {why}")));
        if bytes[..4] != MAGIC_AND_VERSION {
            return refuse(format!("it starts with {:02x?}, NNEF 1.0 with {MAGIC_AND_VERSION:02x?}", &bytes[..4]));
        }
        let rank = u32_at(8) as usize;
        if rank > MAX_RANK {
            return refuse(format!("rank {rank} is above {MAX_RANK}"));
        }
        let (item_type, bits, vendor) = (u16_at(48), u32_at(44), u16_at(50));
        let Some(dtype) = DatType::from_code(item_type, bits, vendor) else {
            return refuse(format!("item type {item_type:#x} of {bits} bits, vendor {vendor:#x}, is unknown"));
        };
        let shape: Vec<usize> = (0..rank).map(|axis| u32_at(12 + 4 * axis) as usize).collect();
        let header = Self::new(dtype, &shape).or_else(|e| refuse(e.to_string()))?;
        if header.payload_len != u32_at(4) {
            let (shape, declared, needed) = (&shape, u32_at(4), header.payload_len);
            return refuse(format!("{} of shape {shape:?} takes {needed} bytes, it declares {declared}", dtype.name()));
        }
        Ok(header)
    }

    /// [`Error::InvalidArgument`] unless a payload of `len` bytes is what this header announces.
    pub fn check_payload(&self, len: usize) -> Result<()> {
        if len as u64 == self.payload_len() {
            return Ok(());
        }
        let (name, shape, needed) = (self.dtype.name(), self.shape(), self.payload_len);
        Err(Error::InvalidArgument(format!("{name} of shape {shape:?} takes {needed} bytes, {len} were given")))
    }
}

/// Opens a `.dat`, its header read and checked against the size of the file; the file stands at the payload.
pub fn open(path: &Path) -> Result<(Header, File)> {
    let named = |e: Error| Error::InconsistentTensor(format!("{}: {e}", path.display()));
    let mut file = File::open(path).map_err(Error::io(path))?;
    let size = file.metadata().map_err(Error::io(path))?.len();
    if size < HEADER_LEN as u64 {
        return Err(named(Error::InconsistentTensor(format!("{size} bytes, a .dat has at least {HEADER_LEN}"))));
    }
    let mut bytes = [0; HEADER_LEN];
    file.read_exact(&mut bytes).map_err(Error::io(path))?;
    let header = Header::decode(&bytes).map_err(named)?;
    if size != header.file_len() {
        let needed = header.file_len();
        return Err(named(Error::InconsistentTensor(format!("{size} bytes, its header announces {needed}"))));
    }
    Ok((header, file))
}

/// Header and payload of a `.dat`. Stops when `stop` turns true.
pub fn read(path: &Path, stop: &AtomicBool) -> Result<(Header, Vec<u8>)> {
    let (header, mut file) = open(path)?;
    let mut payload = vec![0; header.payload_len as usize];
    for chunk in payload.chunks_mut(COPY_LEN) {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        file.read_exact(chunk).map_err(Error::io(path))?;
        if !header.admits(chunk) {
            return Err(Error::InconsistentTensor(format!("{}: a boolean is neither 0 nor 1", path.display())));
        }
    }
    Ok((header, payload))
}

/// Writes a `.dat` atomically; `payload` must yield what `header` announces. Stops when `stop` turns true.
pub fn write(path: &Path, header: &Header, payload: impl Read, stop: &AtomicBool) -> Result<()> {
    let mut out = BufWriter::with_capacity(COPY_LEN, AtomicFile::create(path)?);
    out.write_all(&header.encode()).map_err(Error::io(path))?;
    let mut payload = Exactly::new(payload, header.payload_len(), stop);
    std::io::copy(&mut payload, &mut out).map_err(|e| payload.explain(e, path))?;
    out.into_inner().map_err(|e| Error::io(path)(e.into_error()))?.commit().map(drop)
}
