//! Bodies: where they end, and chunks.

use bytes::{Buf, Bytes, BytesMut};
use types::Fields;

use crate::rules::is_forbidden_trailer;
use crate::{Framing, HeadScanner, InvalidMessage, Limits};

/// What [`BodyDecoder::decode`] found.
#[derive(Debug, PartialEq)]
pub enum Decoded {
    /// More bytes are needed.
    NeedMore,
    /// A piece of the body; never empty.
    Data(Bytes),
    /// The message has ended, perhaps with trailers.
    End(Option<Fields>),
}

/// Takes one body out of a buffer.
///
/// ```text
///  Length(n) ──n bytes──────────────────────────► Done
///  Size ──"1a;x" CR LF──► Chunk(26) ──► ChunkEnd ──CR LF──► Size
///  Size ──"0" CR LF──► Trailers ──empty line──► Done
///  UntilClose ──end of input──► Done
/// ```
#[derive(Debug)]
pub struct BodyDecoder {
    state: State,
    limits: Limits,
    extension_bytes: usize,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Length(u64),
    Size,
    Chunk(u64),
    ChunkEnd,
    Trailers(HeadScanner),
    UntilClose,
    Done,
    Broken(InvalidMessage),
}

/// A chunk's size line without extension: 16 digits, CR, LF.
const SIZE_DIGITS_MAX: usize = 16;

impl BodyDecoder {
    /// A decoder for a body framed so.
    pub fn new(framing: Framing, limits: Limits) -> Self {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::Done,
            Framing::Length(n) => State::Length(n),
            Framing::Chunked => State::Size,
            Framing::UntilClose | Framing::Tunnel => State::UntilClose,
        };
        Self { state, limits, extension_bytes: 0 }
    }

    /// Whether the body has ended.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Takes the next piece out of `buf`. After `End` it says `End(None)` again and takes nothing.
    pub fn decode(&mut self, buf: &mut BytesMut) -> Result<Decoded, InvalidMessage> {
        let result = self.step(buf);
        if let Err(error) = result {
            self.state = State::Broken(error);
        }
        result
    }

    /// The peer has closed: the end of an until-close body, a truncation of any other.
    pub fn end_of_input(&mut self) -> Result<(), InvalidMessage> {
        match self.state {
            State::Done => Ok(()),
            State::UntilClose => {
                self.state = State::Done;
                Ok(())
            }
            State::Broken(error) => Err(error),
            _ => Err(InvalidMessage::Truncated),
        }
    }

    fn step(&mut self, buf: &mut BytesMut) -> Result<Decoded, InvalidMessage> {
        loop {
            match self.state {
                State::Done => return Ok(Decoded::End(None)),
                State::Broken(error) => return Err(error),
                State::UntilClose if buf.is_empty() => return Ok(Decoded::NeedMore),
                State::UntilClose => return Ok(Decoded::Data(buf.split().freeze())),
                State::Length(left) => {
                    let Some((data, left)) = take(buf, left) else { return Ok(Decoded::NeedMore) };
                    self.state = if left == 0 { State::Done } else { State::Length(left) };
                    return Ok(Decoded::Data(data));
                }
                State::Chunk(left) => {
                    let Some((data, left)) = take(buf, left) else { return Ok(Decoded::NeedMore) };
                    self.state = if left == 0 { State::ChunkEnd } else { State::Chunk(left) };
                    return Ok(Decoded::Data(data));
                }
                State::ChunkEnd => match buf.as_ref() {
                    [b'\r', b'\n', ..] => {
                        buf.advance(2);
                        self.state = State::Size;
                    }
                    [] | [b'\r'] => return Ok(Decoded::NeedMore),
                    _ => return Err(InvalidMessage::Chunk),
                },
                State::Size => match self.size_line(buf)? {
                    None => return Ok(Decoded::NeedMore),
                    Some(0) => self.state = State::Trailers(HeadScanner::default()),
                    Some(size) => self.state = State::Chunk(size),
                },
                State::Trailers(mut scanner) => {
                    let limits = Limits { head_bytes_max: self.limits.trailer_bytes_max, ..self.limits };
                    let found = scanner.scan(buf, &limits).map_err(|_| InvalidMessage::Trailers)?;
                    let Some(end) = found else {
                        self.state = State::Trailers(scanner);
                        return Ok(Decoded::NeedMore);
                    };
                    let section = buf.split_to(end);
                    self.state = State::Done;
                    return Ok(Decoded::End(parse_trailers(&section, &self.limits)?));
                }
            }
        }
    }

    /// `1*HEXDIG [ ";" extension ] CRLF`; bytes are judged as they come.
    fn size_line(&mut self, buf: &mut BytesMut) -> Result<Option<u64>, InvalidMessage> {
        let mut size: u64 = 0;
        let mut digits = 0;
        let mut at = 0;
        while let Some(byte) = buf.get(at) {
            let Some(digit) = char::from(*byte).to_digit(16) else { break };
            digits += 1;
            if digits > SIZE_DIGITS_MAX {
                return Err(InvalidMessage::Chunk);
            }
            size = size << 4 | u64::from(digit);
            at += 1;
        }
        if at == buf.len() {
            return Ok(None);
        }
        if digits == 0 || size > u64::MAX >> 1 {
            return Err(InvalidMessage::Chunk);
        }
        let extension_start = at;
        if buf[at] == b';' {
            while let Some(byte) = buf.get(at) {
                match byte {
                    b'\r' => break,
                    b'\t' | 0x20..=0x7e | 0x80..=0xff => at += 1,
                    _ => return Err(InvalidMessage::Chunk),
                }
            }
            if self.extension_bytes + (at - extension_start) > self.limits.extension_bytes_max {
                return Err(InvalidMessage::Chunk);
            }
        }
        match &buf[at..] {
            [b'\r', b'\n', ..] => {
                self.extension_bytes += at - extension_start;
                buf.advance(at + 2);
                Ok(Some(size))
            }
            [] | [b'\r'] => Ok(None),
            _ => Err(InvalidMessage::Chunk),
        }
    }
}

fn take(buf: &mut BytesMut, left: u64) -> Option<(Bytes, u64)> {
    if buf.is_empty() {
        return None;
    }
    let n = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
    Some((buf.split_to(n).freeze(), left - n as u64))
}

fn parse_trailers(section: &[u8], limits: &Limits) -> Result<Option<Fields>, InvalidMessage> {
    if section == b"\r\n" {
        return Ok(None);
    }
    let mut room = [httparse::EMPTY_HEADER; 128];
    let fields = match httparse::parse_headers(section, &mut room) {
        Ok(httparse::Status::Complete((n, fields))) if n == section.len() => fields,
        _ => return Err(InvalidMessage::Trailers),
    };
    if fields.len() > limits.fields_max || crate::head::count_cr(section) != fields.len() + 1 {
        return Err(InvalidMessage::Trailers);
    }
    let mut trailers = Fields::with_capacity(fields.len(), section.len());
    for field in fields {
        trailers.push_any_case(field.name, field.value);
    }
    trailers.retain(|name, _| !is_forbidden_trailer(name));
    Ok((!trailers.is_empty()).then_some(trailers))
}
