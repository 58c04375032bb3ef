//! As much HTTP/1.1 as a test's client needs: one request, its answer whole or line by line.

use std::io::{self, Read, Write};

use crate::tls::read_line;

/// An answer whose body is yet to be read.
#[derive(Debug)]
pub struct Response<S> {
    /// The status code.
    pub status: u16,
    stream: S,
    buffer: Vec<u8>,
    body: Body,
}

#[derive(Debug)]
enum Body {
    Length(usize),
    Chunked { left: usize, last: bool },
    UntilEnd,
}

/// Sends one request and reads the head of the answer.
///
/// # Errors
///
/// What the stream says; `UnexpectedEof` if it ends before the answer, `InvalidData` if this is no HTTP.
pub fn request<S: Read + Write>(
    mut stream: S,
    method: &str,
    path: &str,
    host: &str,
    body: &str,
) -> io::Result<Response<S>> {
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes())?;
    stream.flush()?;
    let mut buffer = Vec::new();
    let first = read_line(&mut stream, &mut buffer)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = first
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .ok_or(io::ErrorKind::InvalidData)?;
    let mut kind = Body::UntilEnd;
    loop {
        let line = read_line(&mut stream, &mut buffer)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        if line.is_empty() {
            return Ok(Response {
                status,
                stream,
                buffer,
                body: kind,
            });
        }
        let (name, value) = line.split_once(':').ok_or(io::ErrorKind::InvalidData)?;
        if name.eq_ignore_ascii_case("content-length") {
            kind = Body::Length(value.trim().parse().map_err(|_| io::ErrorKind::InvalidData)?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") && value.trim().eq_ignore_ascii_case("chunked") {
            kind = Body::Chunked { left: 0, last: false };
        }
    }
}

impl<S: Read> Response<S> {
    /// The whole body.
    ///
    /// # Errors
    ///
    /// What the stream says.
    pub fn text(&mut self) -> io::Result<String> {
        let mut text = String::new();
        self.read_to_string(&mut text)?;
        Ok(text)
    }

    /// The stream below, for its socket.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// The stream back, for the next request; the body has to be read.
    pub fn into_stream(self) -> S {
        self.stream
    }

    /// Reads at most `most` bytes of the stream behind the framing.
    fn raw(&mut self, out: &mut [u8], most: usize) -> io::Result<usize> {
        let most = most.min(out.len());
        if self.buffer.is_empty() {
            return self.stream.read(&mut out[..most]);
        }
        let count = most.min(self.buffer.len());
        out[..count].copy_from_slice(&self.buffer[..count]);
        self.buffer.drain(..count);
        Ok(count)
    }

    /// The size line of the next chunk, after the line end of the one before.
    fn next_chunk(&mut self) -> io::Result<usize> {
        loop {
            let line = read_line(&mut self.stream, &mut self.buffer)?.ok_or(io::ErrorKind::UnexpectedEof)?;
            if !line.is_empty() {
                let size = line.split(';').next().unwrap_or_default();
                return usize::from_str_radix(size.trim(), 16).map_err(|_| io::ErrorKind::InvalidData.into());
            }
        }
    }
}

impl<S: Read> Read for Response<S> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self.body {
            Body::UntilEnd => self.raw(out, usize::MAX),
            Body::Length(0) | Body::Chunked { last: true, .. } => Ok(0),
            Body::Length(left) => {
                let count = self.raw(out, left)?;
                if count == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.body = Body::Length(left - count);
                Ok(count)
            }
            Body::Chunked { left: 0, .. } => {
                let left = self.next_chunk()?;
                if left == 0 {
                    // The empty line after the last chunk belongs to this answer, not to the next.
                    read_line(&mut self.stream, &mut self.buffer)?;
                }
                self.body = Body::Chunked { left, last: left == 0 };
                self.read(out)
            }
            Body::Chunked { left, last } => {
                let count = self.raw(out, left)?;
                if count == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.body = Body::Chunked {
                    left: left - count,
                    last,
                };
                Ok(count)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunked_answer_is_put_together_and_leaves_the_stream_at_its_end() {
        let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nWiki\r\n5\r\npedia\r\n0\r\n\r\n";
        let mut response = request(Script(answer.as_bytes()), "GET", "/", "x", "").unwrap();
        assert_eq!(response.status, 200);
        assert_eq!(response.text().unwrap(), "Wikipedia");
        assert!(response.buffer.is_empty() && response.into_stream().0.is_empty());
    }

    #[test]
    fn an_answer_that_ends_early_is_an_error() {
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello";
        let mut response = request(Script(answer.as_bytes()), "GET", "/", "x", "").unwrap();
        assert_eq!(response.text().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    /// Answers whatever it is asked.
    struct Script(&'static [u8]);

    impl Read for Script {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.0.read(out)
        }
    }

    impl Write for Script {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}
