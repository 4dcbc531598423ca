//! Writes that happen at most once: the name under which a client may repeat them.
//!
//! A client draws a name for itself and counts its writes. Name and count together ([`Once`]) mean one
//! write for ever, so that whoever did not get an answer asks again with the same ones and gets the
//! answer to the first: the state machine remembers it ([`crate::store`], `dedupe`). With each write a
//! client also tells its *floor*: it has the answers of all its writes below and asks for none of them
//! again, so they can be forgotten. A write below the floor is never carried out.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The longest allowed client name, in bytes. 16 characters of base64 make a name that nobody else
/// draws; the rest is room for those who put a host or a purpose into it.
pub const CLIENT_NAME_BYTES_MAX: usize = 64;

/// The largest sequence number. A floor may lie one above every sequence, and must be a number, too.
pub const SEQ_MAX: u64 = u64::MAX - 1;

/// The name that a client chose for itself: 1 to [`CLIENT_NAME_BYTES_MAX`] visible ASCII characters
/// other than `/`. Cloning is cheap.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientName(Arc<str>);

/// A text that is not a [`ClientName`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a client is 1 to {CLIENT_NAME_BYTES_MAX} visible ASCII characters other than `/`")]
pub struct InvalidClientName;

impl ClientName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a text can be a name.
    ///
    /// # Errors
    /// It cannot.
    pub fn check(text: &str) -> Result<(), InvalidClientName> {
        let allowed = |b: u8| b.is_ascii_graphic() && b != b'/';
        if text.is_empty() || text.len() > CLIENT_NAME_BYTES_MAX || !text.bytes().all(allowed) {
            return Err(InvalidClientName);
        }
        Ok(())
    }
}

impl FromStr for ClientName {
    type Err = InvalidClientName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::check(text)?;
        Ok(Self(text.into()))
    }
}

impl Borrow<str> for ClientName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClientName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ClientName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A client and its floor: what many of its writes have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientFloor {
    /// Who asks.
    pub client: ClientName,
    /// It has the answers of all its writes with a lower sequence.
    pub floor: u64,
}

/// Makes a write one that happens at most once. The sequence is not below the floor, and at most
/// [`SEQ_MAX`]: [`Once::new`] sees to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Once {
    client: ClientName,
    seq: u64,
    floor: u64,
}

/// A sequence with which there is no [`Once`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSeq {
    /// The client says that it has the answer to this very write.
    #[error("the floor, {floor}, is above the sequence, {seq}")]
    BelowFloor {
        /// The sequence.
        seq: u64,
        /// The floor.
        floor: u64,
    },
    /// The largest 64-bit number.
    #[error("the sequence may be {SEQ_MAX} at most")]
    TooLarge,
}

impl Once {
    /// Write number `seq` of a client with this floor.
    ///
    /// # Errors
    /// The floor is above the sequence, or the sequence above [`SEQ_MAX`].
    pub fn new(client: ClientFloor, seq: u64) -> Result<Self, InvalidSeq> {
        let ClientFloor { client, floor } = client;
        check_seq(seq, floor)?;
        Ok(Self { client, seq, floor })
    }

    /// Who asks.
    pub fn client(&self) -> &ClientName {
        &self.client
    }

    /// Which of the client's writes it is.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// The client has the answers of all its writes with a lower sequence.
    pub fn floor(&self) -> u64 {
        self.floor
    }
}

fn check_seq(seq: u64, floor: u64) -> Result<(), InvalidSeq> {
    if floor > seq {
        return Err(InvalidSeq::BelowFloor { seq, floor });
    }
    if seq > SEQ_MAX {
        return Err(InvalidSeq::TooLarge);
    }
    Ok(())
}

/// A [`Once`] whose client's name stands elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnceRef<'a> {
    client: &'a str,
    seq: u64,
    floor: u64,
}

/// A client's name, a sequence and a floor with which there is no [`OnceRef`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidOnce {
    /// The name is none.
    #[error(transparent)]
    Client(#[from] InvalidClientName),
    /// The sequence does not go with the floor, or is too large.
    #[error(transparent)]
    Seq(#[from] InvalidSeq),
}

impl<'a> OnceRef<'a> {
    /// Write number `seq` of this client with this floor.
    ///
    /// # Errors
    /// `client` is no name, the floor is above the sequence, or the sequence above [`SEQ_MAX`].
    pub fn new(client: &'a str, floor: u64, seq: u64) -> Result<Self, InvalidOnce> {
        ClientName::check(client)?;
        check_seq(seq, floor)?;
        Ok(Self { client, seq, floor })
    }

    /// Another write of the same client with the same floor.
    ///
    /// # Errors
    /// The floor is above the sequence, or the sequence above [`SEQ_MAX`].
    pub fn with_seq(self, seq: u64) -> Result<Self, InvalidSeq> {
        check_seq(seq, self.floor)?;
        Ok(Self { seq, ..self })
    }

    /// The name of the client that asks.
    pub fn client(&self) -> &'a str {
        self.client
    }

    /// Which of the client's writes it is.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// The client has the answers of all its writes with a lower sequence.
    pub fn floor(&self) -> u64 {
        self.floor
    }

    /// Whether both were sent by the same client with the same floor.
    pub fn same_client_floor(&self, other: &Self) -> bool {
        self.floor == other.floor && self.client == other.client
    }
}

impl<'a> From<&'a Once> for OnceRef<'a> {
    fn from(once: &'a Once) -> Self {
        let Once { client, seq, floor } = once;
        Self { client: client.as_str(), seq: *seq, floor: *floor }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_to_their_alphabet() {
        for good in ["a", "~!\"%", "host:1234", &"x".repeat(CLIENT_NAME_BYTES_MAX)] {
            assert_eq!(good.parse::<ClientName>().unwrap().as_str(), good);
        }
        for bad in ["", " ", "a b", "a/b", "ä", "\t", &"x".repeat(CLIENT_NAME_BYTES_MAX + 1)] {
            assert_eq!(bad.parse::<ClientName>(), Err(InvalidClientName), "{bad}");
        }
    }

    #[test]
    fn a_floor_is_never_above_its_sequence() {
        let at = |floor| ClientFloor { client: "c".parse().unwrap(), floor };
        assert!(Once::new(at(7), 7).is_ok() && Once::new(at(0), 0).is_ok());
        assert_eq!(Once::new(at(8), 7), Err(InvalidSeq::BelowFloor { seq: 7, floor: 8 }));
        assert_eq!(Once::new(at(0), u64::MAX), Err(InvalidSeq::TooLarge));
        assert!(Once::new(at(SEQ_MAX), SEQ_MAX).is_ok());
        let seventh = OnceRef::new("c", 7, 7).unwrap();
        assert!(seventh.with_seq(8).is_ok() && seventh.with_seq(SEQ_MAX).is_ok());
        assert_eq!(seventh.with_seq(6), Err(InvalidSeq::BelowFloor { seq: 6, floor: 7 }));
        assert_eq!(seventh.with_seq(u64::MAX), Err(InvalidSeq::TooLarge));
        assert!(OnceRef::new("c", 8, 7).is_err() && OnceRef::new("a b", 0, 7).is_err());
    }
}
