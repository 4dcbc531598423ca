//! Keys in URL paths: any bytes out, the same bytes back in, nothing guessed.
//!
//! Servers decode the raw path with [`decode`]; clients write it with [`encode`]. Both are pure. The
//! decoder is strict because a key that is understood differently by two nodes is two keys: a `%`
//! without two hex digits and an unescaped `/` are errors, `+` is a plus sign, and nothing is
//! normalised: `.` and `..` are keys like any other. Bytes above 127 that a client did not escape are
//! taken as they come.

use bytes::Bytes;

/// Why a path does not hold a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyPathError {
    /// Nothing follows the prefix.
    #[error("the key is empty")]
    Empty,
    /// A `/` inside the key must be written as `%2F`.
    #[error("the key has an unescaped `/` at byte {at}; write it as %2F")]
    UnescapedSlash {
        /// Where in the escaped text, from 0.
        at: usize,
    },
    /// A `%` that two hex digits do not follow.
    #[error("the key has a `%` without two hex digits at byte {at}")]
    BadEscape {
        /// Where in the escaped text, from 0.
        at: usize,
    },
}

/// A key as it stands in a path.
///
/// Letters, digits and `-._~` stand for themselves, everything else is escaped. The keys `.` and `..`
/// are escaped too, so that no URL library on the way mistakes them for directories.
pub fn encode(key: &[u8]) -> String {
    let all = matches!(key, b"." | b"..");
    let mut text = String::with_capacity(key.len());
    for &byte in key {
        if is_unreserved(byte) && !all {
            text.push(char::from(byte));
        } else {
            text.push('%');
            text.push(char::from(HEX_DIGITS[usize::from(byte >> 4)]));
            text.push(char::from(HEX_DIGITS[usize::from(byte & 15)]));
        }
    }
    text
}

/// The key that the raw rest of a path stands for. It is never empty.
pub fn decode(raw: &str) -> Result<Bytes, KeyPathError> {
    let raw = raw.as_bytes();
    if raw.is_empty() {
        return Err(KeyPathError::Empty);
    }
    let mut key = Vec::with_capacity(raw.len());
    let mut at = 0;
    while at < raw.len() {
        match raw[at] {
            b'/' => return Err(KeyPathError::UnescapedSlash { at }),
            b'%' => {
                let digit = |place: usize| raw.get(place).copied().and_then(hex_value);
                let (Some(high), Some(low)) = (digit(at + 1), digit(at + 2)) else {
                    return Err(KeyPathError::BadEscape { at });
                };
                key.push(high << 4 | low);
                at += 3;
            }
            byte => {
                key.push(byte);
                at += 1;
            }
        }
    }
    // An exact allocation: the key lives on in the log and in caches, its escapes do not.
    Ok(Bytes::from(key.into_boxed_slice()))
}

const HEX_DIGITS: &[u8; 16] = b"0123456789ABCDEF";

fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

fn hex_value(byte: u8) -> Option<u8> {
    // `to_digit` answers at most 15 for radix 16.
    char::from(byte).to_digit(16).map(|digit| digit as u8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Every key survives the way out and back, as visible ASCII without a `/`.
        #[test]
        fn encoding_round_trips(key in proptest::collection::vec(any::<u8>(), 1..200)) {
            let text = encode(&key);
            prop_assert!(text.bytes().all(|b| is_unreserved(b) || b == b'%'));
            prop_assert_eq!(decode(&text).unwrap(), key);
        }

        /// No text makes the decoder panic, and what it accepts is never empty nor longer than the text.
        #[test]
        fn decoding_is_total(text in "[%/a-fA-F0-9zü.]{0,40}") {
            if let Ok(key) = decode(&text) {
                prop_assert!(!key.is_empty() && key.len() <= text.len());
                prop_assert_eq!(decode(&encode(&key)).unwrap(), key);
            }
        }
    }

    #[test]
    fn escapes_are_taken_literally_and_only_once() {
        for (raw, key) in [
            ("k", &b"k"[..]),
            ("%ff%00", b"\xff\0"),
            ("%2F", b"/"),
            ("%2f", b"/"),
            ("%252F", b"%2F"),
            ("a+b", b"a+b"),
            (".", b"."),
            ("..", b".."),
            ("%2e%2E", b".."),
            ("ü", "ü".as_bytes()),
        ] {
            assert_eq!(decode(raw).unwrap(), key, "{raw}");
        }
    }

    #[test]
    fn what_is_not_a_key_is_refused_with_its_place() {
        assert_eq!(decode(""), Err(KeyPathError::Empty));
        assert_eq!(decode("a/b"), Err(KeyPathError::UnescapedSlash { at: 1 }));
        for (raw, at) in [("%", 0), ("a%4", 1), ("%zz", 0), ("%4g", 0), ("ab%%41", 2), ("%+1", 0)] {
            assert_eq!(decode(raw), Err(KeyPathError::BadEscape { at }), "{raw}");
        }
    }

    #[test]
    fn dots_alone_are_escaped() {
        assert_eq!(encode(b"."), "%2E");
        assert_eq!(encode(b".."), "%2E%2E");
        assert_eq!(encode(b"a.b"), "a.b");
        assert_eq!(encode(b"a/b%"), "a%2Fb%25");
    }
}
