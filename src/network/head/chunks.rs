//! Where a body of chunks ends (RFC 9112, section 7.1), followed byte by byte.
//!
//! ```text
//! body  = chunk*, "0" ext CRLF, (trailer CRLF)*, CRLF
//! chunk = size:hex ext CRLF, so many bytes, CRLF        ext = "" | ";" anything but CR and LF
//! ```
//! Stricter than hyper, so that whatever passes here ends for hyper in the same place.

/// Larger than any body that is accepted; hyper's own arithmetic ends at 16 digits.
const SIZE_DIGITS_MAX: u8 = 12;

/// How far a body of chunks has come.
#[derive(Debug)]
pub(super) struct Chunks(At);

#[derive(Debug, Clone, Copy, PartialEq)]
enum At {
    /// In a chunk's size.
    Size {
        size: u64,
        digits: u8,
    },
    /// Behind it.
    Extension {
        size: u64,
    },
    /// At the line feed that ends the size.
    SizeLf {
        size: u64,
    },
    /// In a chunk: so many bytes are left.
    Data {
        left: u64,
    },
    /// At the end of a chunk.
    DataCr,
    DataLf,
    /// At the beginning of a line behind the last chunk, in such a line, at its line feed.
    Line,
    Trailer,
    TrailerLf,
    /// At the line feed that ends the body.
    EndLf,
    End,
}

impl Default for Chunks {
    fn default() -> Self {
        Self(At::Size { size: 0, digits: 0 })
    }
}

impl Chunks {
    /// How many bytes at the start of `bytes` belong to the body; `None` when one of them does not
    /// belong anywhere.
    pub(super) fn scan(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut count = 0;
        while count < bytes.len() && !self.ended() {
            if let Some(left) = self.data_left() {
                let part = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len() - count);
                self.passed(part as u64);
                count += part;
            } else {
                self.0 = step(self.0, bytes[count])?;
                count += 1;
            }
        }
        Some(count)
    }

    /// How much is left of a chunk's data.
    pub(super) fn data_left(&self) -> Option<u64> {
        match self.0 {
            At::Data { left } => Some(left),
            _ => None,
        }
    }

    /// So much of a chunk's data went by.
    pub(super) fn passed(&mut self, bytes: u64) {
        if let At::Data { left } = &mut self.0 {
            *left -= bytes;
            if *left == 0 {
                self.0 = At::DataCr;
            }
        }
    }

    /// Whether the last byte was seen.
    pub(super) fn ended(&self) -> bool {
        self.0 == At::End
    }
}

fn step(at: At, byte: u8) -> Option<At> {
    let next = match (at, byte) {
        (At::Size { size, digits: 1.. } | At::Extension { size }, b'\r') => At::SizeLf { size },
        (At::Size { size, digits: 1.. }, b';') => At::Extension { size },
        (At::Size { size, digits }, _) if digits < SIZE_DIGITS_MAX => {
            let digit = char::from(byte).to_digit(16)?;
            At::Size { size: size * 16 + u64::from(digit), digits: digits + 1 }
        }
        (At::Extension { .. }, 0x20..=0x7e) => at,
        (At::SizeLf { size: 0 }, b'\n') => At::Line,
        (At::SizeLf { size }, b'\n') => At::Data { left: size },
        (At::DataCr, b'\r') => At::DataLf,
        (At::DataLf, b'\n') => At::Size { size: 0, digits: 0 },
        (At::Line, b'\r') => At::EndLf,
        (At::EndLf, b'\n') => At::End,
        (At::Trailer, b'\r') => At::TrailerLf,
        (At::TrailerLf, b'\n') => At::Line,
        (At::Line | At::Trailer, 0x20..=0x7e) => At::Trailer,
        _ => return None,
    };
    Some(next)
}
