//! Changes of inputs: bytes, words of a dictionary, fields of protobuf messages.

/// A generator of numbers that gives the same ones for the same seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 for a bound of 0.
    pub fn below(&mut self, bound: usize) -> usize {
        let wide = u128::from(self.number()) * bound as u128;
        usize::try_from(wide >> 64).unwrap_or(0)
    }

    /// One of `items`, which are not empty.
    pub fn one_of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    fn byte(&mut self) -> u8 {
        const ODD: [u8; 12] = [0, 1, 9, 10, 13, 32, 58, 59, 0x7f, 0x80, 0xfe, 0xff];
        let [any, ..] = self.number().to_le_bytes();
        if self.below(2) == 0 { *self.one_of(&ODD) } else { any }
    }
}

/// Inputs are cut to this length.
pub const LENGTH_MAX: usize = 16 * 1024;

/// Changes bytes here and there; `words` are put in, in whole.
pub fn bytes(input: &[u8], words: &[&str], random: &mut Random) -> Vec<u8> {
    let mut out = input.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(out.len() + 1);
        let end = (at + 1 + random.below(16)).min(out.len());
        match random.below(7) {
            0 if at < out.len() => out[at] = random.byte(),
            1 => out.insert(at, random.byte()),
            2 => drop(out.drain(at..end)),
            3 => {
                let piece = out[at..end].to_vec();
                let to = random.below(out.len() + 1);
                out.splice(to..to, piece);
            }
            4 => out.truncate(at),
            5 if at < out.len() => out[at] ^= 1 << random.below(8),
            _ if !words.is_empty() => {
                let word = random.one_of(words).bytes();
                out.splice(at..at, word);
            }
            _ => {}
        }
    }
    out.truncate(LENGTH_MAX);
    out
}

/// One field of a protobuf message as it stands on the wire.
#[derive(Clone, Debug)]
struct Field {
    number: u64,
    value: Value,
}

#[derive(Clone, Debug)]
enum Value {
    Varint(u64),
    Fixed64([u8; 8]),
    Bytes(Vec<u8>),
    Fixed32([u8; 4]),
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..70).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f).checked_shl(shift)?;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take_array<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (front, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*front)
}

fn fields(mut bytes: &[u8]) -> Option<Vec<Field>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let key = take_varint(&mut bytes)?;
        let value = match key & 7 {
            0 => Value::Varint(take_varint(&mut bytes)?),
            1 => Value::Fixed64(take_array(&mut bytes)?),
            2 => {
                let length = usize::try_from(take_varint(&mut bytes)?).ok()?;
                let (front, rest) = bytes.split_at_checked(length)?;
                bytes = rest;
                Value::Bytes(front.to_vec())
            }
            5 => Value::Fixed32(take_array(&mut bytes)?),
            _ => return None,
        };
        if key >> 3 == 0 {
            return None;
        }
        all.push(Field { number: key >> 3, value });
    }
    Some(all)
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

fn encoded(fields: &[Field]) -> Vec<u8> {
    let mut out = Vec::new();
    for field in fields {
        let mut key = |kind: u64| put_varint(&mut out, field.number << 3 | kind);
        match &field.value {
            Value::Varint(value) => {
                key(0);
                put_varint(&mut out, *value);
            }
            Value::Fixed64(bytes) => {
                key(1);
                out.extend_from_slice(bytes);
            }
            Value::Bytes(bytes) => {
                key(2);
                put_varint(&mut out, bytes.len() as u64);
                out.extend_from_slice(bytes);
            }
            Value::Fixed32(bytes) => {
                key(5);
                out.extend_from_slice(bytes);
            }
        }
    }
    out
}

/// Numbers at the edges.
const NUMBERS: [u64; 10] = [0, 1, 2, 7, 100, 0xffff, 0x1_0000, 0xffff_ffff, 0x7fff_ffff_ffff_ffff, u64::MAX];

/// Changes a field of a message, or of one inside it; lengths stay right.
pub fn message(input: &[u8], words: &[&str], random: &mut Random) -> Vec<u8> {
    let Some(mut all) = fields(input).filter(|all| !all.is_empty()) else { return bytes(input, words, random) };
    let at = random.below(all.len());
    let inside = matches!(&all[at].value, Value::Bytes(bytes) if !bytes.is_empty());
    if inside && random.below(6) != 0 {
        if let Value::Bytes(bytes) = &mut all[at].value {
            *bytes = message(bytes, words, random);
        }
        return encoded(&all);
    }
    match random.below(6) {
        0 => drop(all.remove(at)),
        1 => {
            let copy = all[at].clone();
            all.push(copy);
        }
        2 => all[at].number = 1 + random.below(40) as u64,
        3 => all[at].value = Value::Varint(*random.one_of(&NUMBERS)),
        4 => {
            let to = random.below(all.len());
            all.swap(at, to);
        }
        _ => match &mut all[at].value {
            Value::Varint(value) => *value = value.wrapping_add(random.below(5) as u64).wrapping_sub(2),
            Value::Fixed64(value) => *value = random.number().to_le_bytes(),
            Value::Fixed32(value) => value.copy_from_slice(&random.number().to_le_bytes()[..4]),
            Value::Bytes(value) => *value = bytes(value, words, random),
        },
    }
    let mut out = encoded(&all);
    out.truncate(LENGTH_MAX);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_and_written_back() {
        let message = [8, 150, 1, 18, 3, b'a', b'b', b'c', 29, 1, 2, 3, 4, 33, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(encoded(&fields(&message).unwrap()), message);
        assert!(fields(&[18, 9, 1]).is_none());
    }
}
