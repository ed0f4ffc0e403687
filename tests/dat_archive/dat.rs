use std::fs;

use _native::dat::{self, DatType, HEADER_LEN, Header, Q40Planes};
use _native::error::Error;
use _native::q40::GROUP_SIZE;
use proptest::prelude::*;
use tempfile::tempdir;
use tract_linalg::block_quant::{BlockQuant, BlockQuantStorage, Q4_0};
use tract_nnef::internal::{DatumType, Tensor};
use tract_nnef::tensors::{read_tensor, write_tensor};

use crate::{GO, listing};

const PLAIN: [(DatType, DatumType); 12] = [
    (DatType::F16, DatumType::F16),
    (DatType::F32, DatumType::F32),
    (DatType::F64, DatumType::F64),
    (DatType::U8, DatumType::U8),
    (DatType::U16, DatumType::U16),
    (DatType::U32, DatumType::U32),
    (DatType::U64, DatumType::U64),
    (DatType::I8, DatumType::I8),
    (DatType::I16, DatumType::I16),
    (DatType::I32, DatumType::I32),
    (DatType::I64, DatumType::I64),
    (DatType::Bool, DatumType::Bool),
];

/// Header bytes from their meaning, written independently of the code under test.
fn golden(data_len: u32, dims: &[u32], tail: [u8; 8]) -> [u8; HEADER_LEN] {
    let mut fields = vec![dims.len() as u32];
    fields.extend(dims);
    fields.resize(9, 0);
    let mut bytes = vec![0x4e, 0xef, 1, 0];
    bytes.extend(data_len.to_le_bytes());
    bytes.extend(fields.iter().flat_map(|f| f.to_le_bytes()));
    bytes.extend(tail);
    bytes.resize(HEADER_LEN, 0);
    bytes.try_into().unwrap()
}

#[test]
fn headers_are_these_bytes() {
    let bits_item_vendor = [
        (DatType::F16, [16, 0, 0, 0, 0, 0, 0, 0], 2),
        (DatType::F32, [32, 0, 0, 0, 0, 0, 0, 0], 4),
        (DatType::F64, [64, 0, 0, 0, 0, 0, 0, 0], 8),
        (DatType::U8, [8, 0, 0, 0, 1, 0, 0, 0], 1),
        (DatType::U16, [16, 0, 0, 0, 1, 0, 0, 0], 2),
        (DatType::U32, [32, 0, 0, 0, 1, 0, 0, 0], 4),
        (DatType::U64, [64, 0, 0, 0, 1, 0, 0, 0], 8),
        (DatType::I8, [8, 0, 0, 0, 4, 0, 0, 0], 1),
        (DatType::I16, [16, 0, 0, 0, 4, 0, 0, 0], 2),
        (DatType::I32, [32, 0, 0, 0, 4, 0, 0, 0], 4),
        (DatType::I64, [64, 0, 0, 0, 4, 0, 0, 0], 8),
        (DatType::Bool, [8, 0, 0, 0, 5, 0, 0, 0], 1),
    ];
    for (dtype, tail, item_len) in bits_item_vendor {
        assert_eq!(Header::new(dtype, &[2, 3]).unwrap().encode(), golden(6 * item_len, &[2, 3], tail), "{dtype:?}");
        assert_eq!(Header::new(dtype, &[]).unwrap().encode(), golden(item_len, &[], tail), "{dtype:?}");
    }
    let q40 = Header::new(DatType::Q40, &[3, 2, 32]).unwrap();
    assert_eq!(q40.encode(), golden(6 * 18, &[3, 2, 32], [0xff, 0xff, 0xff, 0xff, 0x40, 0x30, b'R', b'T']));
    let eight = [1, 2, 3, 1, 1, 1, 1, 2];
    assert_eq!(
        Header::new(DatType::U8, &eight.map(|d| d as usize)).unwrap().encode()[12..44],
        golden(12, &eight, [0; 8])[12..44]
    );
}

#[test]
fn a_written_file_is_header_then_payload() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("w.dat");
    let header = Header::new(DatType::U16, &[3]).unwrap();
    dat::write(&path, &header, [1, 0, 2, 0, 3, 0].as_slice(), &GO).unwrap();
    let expected = [golden(6, &[3], [16, 0, 0, 0, 1, 0, 0, 0]).as_slice(), &[1, 0, 2, 0, 3, 0]].concat();
    assert_eq!(fs::read(&path).unwrap(), expected);
    assert_eq!(dat::read(&path, &GO).unwrap(), (header, vec![1, 0, 2, 0, 3, 0]));
}

#[test]
fn tract_reads_what_we_write_and_we_what_it_writes() {
    for (dtype, datum) in PLAIN {
        for shape in [&[][..], &[1], &[0, 3], &[2, 3, 4], &[1, 2, 1, 2, 1, 2, 1, 3]] {
            if dtype == DatType::Bool && shape.contains(&0) {
                continue;
            }
            let header = Header::new(dtype, shape).unwrap();
            let payload: Vec<u8> = match dtype {
                DatType::Bool => (0..header.payload_len()).map(|i| (i % 3 == 0) as u8).collect(),
                _ => (0..header.payload_len()).map(|i| (i * 37 + 11) as u8).collect(),
            };
            let tensor = read_tensor([header.encode().as_slice(), &payload].concat().as_slice()).unwrap();
            // SAFETY: the payload has the length of the shape, and only 0 and 1 where it is boolean.
            let expected = unsafe { Tensor::from_raw_dt(datum, shape, &payload).unwrap() };
            assert_eq!((tensor.datum_type(), tensor.shape()), (datum, shape), "{dtype:?}");
            assert_eq!(tensor.as_bytes(), expected.as_bytes(), "{dtype:?}");

            let mut theirs = Vec::new();
            write_tensor(&mut theirs, &expected).unwrap();
            let head: &[u8; HEADER_LEN] = theirs[..HEADER_LEN].try_into().unwrap();
            assert_eq!(Header::decode(head).unwrap(), header, "{dtype:?} {shape:?}");
        }
    }
}

#[test]
fn tract_holds_our_q40_planes_as_its_own_blocks() {
    let shape = [4, 3, 64];
    let values: Vec<f32> = (0..shape.iter().product()).map(|i| ((i * 7919) % 997) as f32 / 100.0 - 4.0).collect();
    let blocks = Q4_0.quant_f32(&values).unwrap();
    let codes: Vec<u8> = blocks.chunks(18).flat_map(|b| b[2..].to_vec()).collect();
    let scales: Vec<u8> = blocks.chunks(18).flat_map(|b| b[..2].to_vec()).collect();

    let dir = tempdir().unwrap();
    let path = dir.path().join("w.dat");
    let header = Header::new(DatType::Q40, &shape).unwrap();
    let planes = Q40Planes::new(&codes, &scales).unwrap();
    assert_eq!(planes.blocks_len() as u64, header.payload_len());
    dat::write(&path, &header, planes, &GO).unwrap();

    let tensor = read_tensor(fs::File::open(&path).unwrap()).unwrap();
    assert_eq!(tensor.shape(), &shape);
    let held = tensor.try_storage_as::<BlockQuantStorage>().unwrap();
    assert!(held.format().dyn_eq(&Q4_0));
    assert_eq!(held.value().as_bytes(), blocks.as_bytes());
}

#[test]
fn planes_longer_than_a_chunk_come_out_in_order() {
    let groups = (1 << 16) + 3;
    let codes: Vec<u8> = (0..groups * 16).map(|i| (i / 16 % 251) as u8).collect();
    let scales: Vec<u8> = (0..groups * 2).map(|i| (i / 2 % 241) as u8).collect();
    let mut blocks = Vec::new();
    std::io::Read::read_to_end(&mut Q40Planes::new(&codes, &scales).unwrap(), &mut blocks).unwrap();
    assert_eq!(blocks.len(), groups * 18);
    for (group, block) in blocks.chunks(18).enumerate() {
        assert!(
            block[..2].iter().all(|&b| b == (group % 241) as u8)
                && block[2..].iter().all(|&b| b == (group % 251) as u8)
        );
    }
    assert!(matches!(Q40Planes::new(&codes, &scales[2..]), Err(Error::InvalidArgument(_))));
    assert!(matches!(Q40Planes::new(&codes[1..], &scales), Err(Error::InvalidArgument(_))));
}

#[test]
fn what_the_format_cannot_say_is_refused() {
    let four_gib = 1 << 32;
    for (dtype, shape) in [
        (DatType::U8, &[four_gib][..]),
        (DatType::U8, &[1 << 31, 2]),
        (DatType::F32, &[1 << 30]),
        (DatType::F64, &[0, four_gib]),
        (DatType::U8, &[four_gib - 1; 8]),
        (DatType::U8, &[1; 9]),
        (DatType::Bool, &[0]),
    ] {
        assert!(matches!(Header::new(dtype, shape), Err(Error::InvalidArgument(_))), "{dtype:?} {shape:?}");
    }
    assert_eq!(Header::new(DatType::U8, &[four_gib - 1]).unwrap().payload_len(), (four_gib - 1) as u64);
    for shape in [&[][..], &[32], &[32, 31], &[2, 16], &[32, 4, 4]] {
        assert!(matches!(Header::new(DatType::Q40, shape), Err(Error::ImpossibleQuantization(_))), "{shape:?}");
    }
    assert!(matches!(DatType::from_name("bf16"), Err(Error::InvalidArgument(_))));
}

const EDGES: [usize; 14] = [
    0,
    1,
    2,
    31,
    32,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    (1 << 32) + 1,
    (1 << 63) - 1,
    1 << 63,
    usize::MAX,
];

/// Bytes of a payload, counted without an end.
fn exact_len(dtype: DatType, shape: &[usize]) -> Option<u128> {
    let count = |dims: &[usize]| dims.iter().try_fold(1_u128, |n, &d| n.checked_mul(d as u128));
    let len = if shape.contains(&0) { 0 } else { count(shape)? };
    let bits =
        u128::from(u32::from_le_bytes(Header::new(dtype, &[1, 32]).unwrap().encode()[44..48].try_into().unwrap()));
    Some(if dtype == DatType::Q40 { len / 32 * 18 } else { len.checked_mul(bits / 8)? })
}

#[test]
fn sizes_at_the_edges_are_said_exactly_or_refused() {
    let mut tried = 0;
    for dtype in DatType::ALL {
        let shapes = EDGES.into_iter().flat_map(|a| EDGES.map(move |b| (a, b)));
        for shape in shapes.flat_map(|(a, b)| [vec![a], vec![a, b], vec![a, b, 32], vec![1, a, 1, b, a, 1, 1, b]]) {
            let len = exact_len(dtype, &shape).filter(|&n| n < 1 << 32);
            let row = shape.get(1..).filter(|rest| !rest.is_empty()).and_then(|rest| exact_len(DatType::U8, rest));
            let sayable = shape.iter().all(|&d| d < 1 << 32)
                && (dtype != DatType::Bool || len != Some(0))
                && (dtype != DatType::Q40 || row.is_some_and(|row| row % 32 == 0));
            match Header::new(dtype, &shape) {
                Ok(header) => {
                    assert!(sayable, "{dtype:?} {shape:?}");
                    assert_eq!(Some(u128::from(header.payload_len())), len, "{dtype:?} {shape:?}");
                    assert_eq!(Header::decode(&header.encode()).unwrap(), header);
                }
                // Dimensions may overflow before one of them is 0.
                Err(Error::InvalidArgument(_) | Error::ImpossibleQuantization(_)) => {
                    assert!(!sayable || len.is_none() || shape.contains(&0), "{dtype:?} {shape:?}");
                }
                Err(other) => panic!("{dtype:?} {shape:?}: {other}"),
            }
            tried += 1;
        }
    }
    assert_eq!(tried, 13 * 14 * 14 * 4);
}

#[test]
fn fields_at_the_edges_are_refused_before_a_payload_is_looked_for() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("w.dat");
    for dtype in [DatType::F32, DatType::U8, DatType::Q40] {
        let good = Header::new(dtype, &[2, 32]).unwrap();
        let payload = vec![0; usize::try_from(good.payload_len()).unwrap()];
        // Bytes announced, rank, eight dimensions, bits.
        for at in (4..48).step_by(4) {
            for value in [0, 1, 9, 1 << 16, (1 << 31) - 1, 1 << 31, u32::MAX - 1, u32::MAX] {
                let mut bytes = good.encode().to_vec();
                let unchanged = bytes[at..at + 4] == value.to_le_bytes();
                bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
                bytes.extend_from_slice(&payload);
                fs::write(&path, &bytes).unwrap();
                match dat::read(&path, &GO) {
                    Err(Error::InconsistentTensor(_)) => {}
                    // What stands behind the rank is not read.
                    Ok((header, _)) => assert!((unchanged || at >= 20) && header == good, "{dtype:?} {at} {value}"),
                    Err(other) => panic!("{dtype:?} {at} {value}: {other}"),
                }
            }
        }
    }
}

#[test]
fn headers_that_lie_are_refused() {
    let good = Header::new(DatType::F32, &[2, 3]).unwrap().encode();
    let lies: [(&str, usize, &[u8]); 9] = [
        ("magic", 0, &[0x4f]),
        ("major version", 2, &[2]),
        ("minor version", 3, &[1]),
        ("size", 4, &[25]),
        ("rank", 8, &[9]),
        ("dimension", 12, &[3]),
        ("bits", 44, &[31]),
        ("item type", 48, &[6]),
        ("vendor", 50, &[1]),
    ];
    for (what, at, bytes) in lies {
        let mut bad = good;
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        assert!(matches!(Header::decode(&bad), Err(Error::InconsistentTensor(_))), "{what}");
    }
}

#[test]
fn a_file_of_another_size_than_announced_is_refused() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("w.dat");
    dat::write(&path, &Header::new(DatType::U8, &[5]).unwrap(), [1; 5].as_slice(), &GO).unwrap();
    let whole = fs::read(&path).unwrap();
    for len in 0..whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(matches!(dat::read(&path, &GO), Err(Error::InconsistentTensor(_))), "{len} bytes");
    }
    fs::write(&path, [whole.as_slice(), &[0]].concat()).unwrap();
    assert!(matches!(dat::read(&path, &GO), Err(Error::InconsistentTensor(_))));
    assert!(matches!(dat::read(&dir.path().join("none.dat"), &GO), Err(Error::Io { .. })));
}

#[test]
fn a_short_payload_leaves_the_old_file() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("w.dat");
    let header = Header::new(DatType::U8, &[5]).unwrap();
    dat::write(&path, &header, [7; 5].as_slice(), &GO).unwrap();
    assert!(dat::write(&path, &header, [1; 4].as_slice(), &GO).is_err());
    assert_eq!(dat::read(&path, &GO).unwrap().1, [7; 5]);
    assert_eq!(listing(dir.path()), ["w.dat"]);
}

fn any_header() -> impl Strategy<Value = Header> {
    let shape = prop::collection::vec(0usize..6, 0..=8);
    (prop::sample::select(DatType::ALL.to_vec()), shape).prop_filter_map("sayable", |(dtype, mut shape)| {
        if let (DatType::Q40, Some(last)) = (dtype, shape.last_mut()) {
            *last *= GROUP_SIZE;
        }
        Header::new(dtype, &shape).ok()
    })
}

proptest! {
    #[test]
    fn decode_inverts_encode(header in any_header()) {
        prop_assert_eq!(Header::decode(&header.encode()).unwrap(), header);
    }

    /// No header byte is trusted: what decodes encodes back to the fields it was read from, the rest is a typed error.
    #[test]
    fn a_mutated_header_decodes_to_itself_or_is_refused(header in any_header(), at in 0..HEADER_LEN, byte: u8) {
        let mut bytes = header.encode();
        bytes[at] = byte;
        match Header::decode(&bytes) {
            Ok(decoded) => {
                let rank = decoded.shape().len();
                prop_assert_eq!(&decoded.encode()[..12 + 4 * rank], &bytes[..12 + 4 * rank]);
            }
            Err(Error::InconsistentTensor(_)) => {}
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn noise_never_panics(mut bytes: [u8; HEADER_LEN], magic: bool) {
        if magic {
            bytes[..4].copy_from_slice(&[0x4e, 0xef, 1, 0]);
            bytes[8] %= 9;
            bytes[9..12].fill(0);
        }
        prop_assert!(matches!(Header::decode(&bytes), Ok(_) | Err(Error::InconsistentTensor(_))));
    }
}
