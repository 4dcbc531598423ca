//! Takes fields off the front of foreign bytes, checking each against what is left.

use bytes::{Buf, Bytes};

use super::{DecodeError, ORDINAL_HEARD_MAX, ORDINAL_MAX};

/// What is left to decode. No method panics or allocates more than what is left.
pub(crate) struct Reader {
    left: Bytes,
    ordinal_max: u64,
}

impl Reader {
    pub(crate) fn new(bytes: Bytes) -> Self {
        Self { left: bytes, ordinal_max: ORDINAL_MAX }
    }

    /// Of a message.
    pub(crate) fn of_peer(bytes: Bytes) -> Self {
        Self { left: bytes, ordinal_max: ORDINAL_HEARD_MAX }
    }

    /// The highest term and the highest index that there may be in it.
    pub(super) fn ordinal_max(&self) -> u64 {
        self.ordinal_max
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.want(1)?;
        Ok(self.left.get_u8())
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.want(4)?;
        Ok(self.left.get_u32())
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.want(8)?;
        Ok(self.left.get_u64())
    }

    pub(crate) fn flag(&mut self) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            found => Err(DecodeError::Tag { what: "flag", found }),
        }
    }

    pub(crate) fn version(&mut self, expected: u8) -> Result<(), DecodeError> {
        let found = self.u8()?;
        if found != expected {
            return Err(DecodeError::Version { found });
        }
        Ok(())
    }

    /// A length and that many bytes, without copying them.
    pub(crate) fn bytes(&mut self) -> Result<Bytes, DecodeError> {
        let length = self.u32()?;
        self.want(u64::from(length))?;
        Ok(self.left.split_to(length as usize))
    }

    /// The same with a length of one byte.
    pub(crate) fn short_bytes(&mut self) -> Result<Bytes, DecodeError> {
        let length = self.u8()?;
        self.want(u64::from(length))?;
        Ok(self.left.split_to(usize::from(length)))
    }

    /// A length and that much UTF-8.
    pub(crate) fn text(&mut self) -> Result<String, DecodeError> {
        let bytes = self.bytes()?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(DecodeError::Invalid { what: "text: not UTF-8" }),
        }
    }

    /// A flag, and the thing if it is set.
    pub(crate) fn option<T>(
        &mut self,
        get: impl FnOnce(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Option<T>, DecodeError> {
        if self.flag()? { get(self).map(Some) } else { Ok(None) }
    }

    /// Everything that is left, without copying it.
    pub(crate) fn rest(&mut self) -> Bytes {
        std::mem::take(&mut self.left)
    }

    /// Checks that nothing is left.
    pub(crate) fn end(&self) -> Result<(), DecodeError> {
        match self.left.len() {
            0 => Ok(()),
            left => Err(DecodeError::Trailing(left)),
        }
    }

    fn want(&self, wanted: u64) -> Result<(), DecodeError> {
        let left = self.left.len();
        if wanted > left as u64 {
            return Err(DecodeError::Truncated { wanted, left });
        }
        Ok(())
    }
}

/// The same for what is not to be taken out of the bytes that it stands in.
pub(crate) struct SliceReader<'a> {
    left: &'a [u8],
}

impl<'a> SliceReader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(u8::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length and that many bytes.
    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], DecodeError> {
        let length = self.u32()?;
        self.take(length)
    }

    /// The same with a length of one byte.
    pub(crate) fn short_bytes(&mut self) -> Result<&'a [u8], DecodeError> {
        let length = self.u8()?;
        self.take(u32::from(length))
    }

    /// Checks that nothing is left.
    pub(crate) fn end(&self) -> Result<(), DecodeError> {
        match self.left.len() {
            0 => Ok(()),
            left => Err(DecodeError::Trailing(left)),
        }
    }

    fn take(&mut self, wanted: u32) -> Result<&'a [u8], DecodeError> {
        let (taken, left) =
            self.left.split_at_checked(wanted as usize).ok_or_else(|| self.short(wanted.into()))?;
        self.left = left;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (taken, left) = self.left.split_first_chunk().ok_or_else(|| self.short(N as u64))?;
        self.left = left;
        Ok(*taken)
    }

    #[cold]
    fn short(&self, wanted: u64) -> DecodeError {
        DecodeError::Truncated { wanted, left: self.left.len() }
    }
}
