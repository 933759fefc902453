//! Decoders of a connection's messages: head, then body, then the next head.

use bytes::{Buf, BytesMut};
use types::{RequestHead, ResponseHead};

use crate::{
    BodyDecoder, Decoded, Framing, HeadScanner, InvalidMessage, Limits, RequestKind, RequestMeta, ResponseMeta,
    parse_request, parse_response,
};

/// Reads the requests of one connection.
#[derive(Debug)]
pub struct RequestDecoder {
    limits: Limits,
    scanner: HeadScanner,
    body: BodyDecoder,
    broken: Option<InvalidMessage>,
    /// One empty line before a request line is forgiven (RFC 9112, section 2.2).
    skipped_line: bool,
}

impl RequestDecoder {
    /// A decoder for a fresh connection.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            scanner: HeadScanner::default(),
            body: BodyDecoder::new(Framing::None, limits),
            broken: None,
            skipped_line: false,
        }
    }

    /// Reads a head once it is complete; then the body must be taken before the next head.
    pub fn decode_head(
        &mut self,
        buf: &mut BytesMut,
        head: &mut RequestHead,
    ) -> Result<Option<RequestMeta>, InvalidMessage> {
        debug_assert!(self.body.is_done(), "the body before this head has not been taken");
        if let Some(error) = self.broken {
            return Err(error);
        }
        let result = self.head_step(buf, head);
        if let Err(error) = result {
            self.broken = Some(error);
        }
        result
    }

    fn head_step(&mut self, buf: &mut BytesMut, head: &mut RequestHead) -> Result<Option<RequestMeta>, InvalidMessage> {
        if !self.skipped_line && buf.first() == Some(&b'\r') {
            match buf.get(1) {
                None => return Ok(None),
                Some(b'\n') => {
                    buf.advance(2);
                    self.skipped_line = true;
                    self.scanner = HeadScanner::default();
                }
                Some(_) => return Err(InvalidMessage::LineEnd),
            }
        }
        let Some(end) = self.scanner.scan(buf, &self.limits)? else { return Ok(None) };
        let meta = parse_request(&buf[..end], &self.limits, head)?;
        buf.advance(end);
        self.scanner = HeadScanner::default();
        self.skipped_line = false;
        self.body = BodyDecoder::new(meta.framing, self.limits);
        Ok(Some(meta))
    }

    /// Takes the next piece of the body of the last head.
    pub fn decode_body(&mut self, buf: &mut BytesMut) -> Result<Decoded, InvalidMessage> {
        let result = self.body.decode(buf);
        if let Err(error) = result {
            self.broken = Some(error);
        }
        result
    }

    /// Whether the body of the last head has been taken whole.
    pub fn body_done(&self) -> bool {
        self.body.is_done()
    }
}

/// Reads the responses of one connection.
#[derive(Debug)]
pub struct ResponseDecoder {
    limits: Limits,
    scanner: HeadScanner,
    body: BodyDecoder,
    broken: Option<InvalidMessage>,
}

impl ResponseDecoder {
    /// A decoder for a fresh connection.
    pub fn new(limits: Limits) -> Self {
        Self { limits, scanner: HeadScanner::default(), body: BodyDecoder::new(Framing::None, limits), broken: None }
    }

    /// Reads a head once it is complete; `kind` is the request it answers. An interim head is
    /// followed by another head.
    pub fn decode_head(
        &mut self,
        buf: &mut BytesMut,
        kind: RequestKind,
        head: &mut ResponseHead,
    ) -> Result<Option<ResponseMeta>, InvalidMessage> {
        debug_assert!(self.body.is_done(), "the body before this head has not been taken");
        if let Some(error) = self.broken {
            return Err(error);
        }
        let result = (|| {
            let Some(end) = self.scanner.scan(buf, &self.limits)? else { return Ok(None) };
            let meta = parse_response(&buf[..end], &self.limits, kind, head)?;
            buf.advance(end);
            self.scanner = HeadScanner::default();
            self.body = BodyDecoder::new(meta.framing, self.limits);
            Ok(Some(meta))
        })();
        if let Err(error) = result {
            self.broken = Some(error);
        }
        result
    }

    /// Takes the next piece of the body of the last head.
    pub fn decode_body(&mut self, buf: &mut BytesMut) -> Result<Decoded, InvalidMessage> {
        let result = self.body.decode(buf);
        if let Err(error) = result {
            self.broken = Some(error);
        }
        result
    }

    /// The upstream has closed: the end of an until-close body, a truncation of any other.
    pub fn end_of_input(&mut self) -> Result<(), InvalidMessage> {
        self.body.end_of_input()
    }

    /// Whether the body of the last head has been taken whole.
    pub fn body_done(&self) -> bool {
        self.body.is_done()
    }
}
