//! Bodies are raw bytes. These two are the least that serde needs to let bytes through unchanged, and
//! nothing else: no length is read from them, no other type can be.

use serde::de::{Deserializer, Visitor, value};
use serde::forward_to_deserialize_any;
use serde::ser::{Error, Impossible, Serialize, Serializer};
use toy_rpc::erased_serde;

/// The bytes that `body` serialises as; an error for anything but bytes.
pub(super) fn to_bytes(
    body: &(dyn erased_serde::Serialize + Send + Sync),
) -> Result<Vec<u8>, value::Error> {
    body.serialize(BytesOnly)
}

/// Gives its bytes, without copying them, to whoever deserialises bytes.
pub(super) struct BodyDeserializer {
    bytes: Vec<u8>,
}

impl BodyDeserializer {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }
}

impl<'de> Deserializer<'de> for BodyDeserializer {
    type Error = value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_byte_buf(self.bytes)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

struct BytesOnly;

fn not_bytes<T>() -> Result<T, value::Error> {
    Err(value::Error::custom("a message body must be bytes"))
}

macro_rules! refuse {
    ($($method:ident($type:ty);)*) => {
        $(fn $method(self, _: $type) -> Result<Vec<u8>, value::Error> { not_bytes() })*
    };
}

impl Serializer for BytesOnly {
    type Ok = Vec<u8>;
    type Error = value::Error;
    type SerializeSeq = Impossible<Vec<u8>, value::Error>;
    type SerializeTuple = Impossible<Vec<u8>, value::Error>;
    type SerializeTupleStruct = Impossible<Vec<u8>, value::Error>;
    type SerializeTupleVariant = Impossible<Vec<u8>, value::Error>;
    type SerializeMap = Impossible<Vec<u8>, value::Error>;
    type SerializeStruct = Impossible<Vec<u8>, value::Error>;
    type SerializeStructVariant = Impossible<Vec<u8>, value::Error>;

    fn serialize_bytes(self, bytes: &[u8]) -> Result<Vec<u8>, value::Error> {
        Ok(bytes.to_vec())
    }

    refuse! {
        serialize_bool(bool); serialize_i8(i8); serialize_i16(i16); serialize_i32(i32);
        serialize_i64(i64); serialize_u8(u8); serialize_u16(u16); serialize_u32(u32);
        serialize_u64(u64); serialize_f32(f32); serialize_f64(f64); serialize_char(char);
        serialize_str(&str); serialize_unit_struct(&'static str);
    }

    fn serialize_none(self) -> Result<Vec<u8>, value::Error> {
        not_bytes()
    }

    fn serialize_some<T: Serialize + ?Sized>(self, _: &T) -> Result<Vec<u8>, value::Error> {
        not_bytes()
    }

    fn serialize_unit(self) -> Result<Vec<u8>, value::Error> {
        not_bytes()
    }

    fn serialize_unit_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
    ) -> Result<Vec<u8>, value::Error> {
        not_bytes()
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: &T,
    ) -> Result<Vec<u8>, value::Error> {
        not_bytes()
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: &T,
    ) -> Result<Vec<u8>, value::Error> {
        not_bytes()
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Self::SerializeSeq, value::Error> {
        not_bytes()
    }

    fn serialize_tuple(self, _: usize) -> Result<Self::SerializeTuple, value::Error> {
        not_bytes()
    }

    fn serialize_tuple_struct(
        self,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleStruct, value::Error> {
        not_bytes()
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleVariant, value::Error> {
        not_bytes()
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Self::SerializeMap, value::Error> {
        not_bytes()
    }

    fn serialize_struct(
        self,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeStruct, value::Error> {
        not_bytes()
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeStructVariant, value::Error> {
        not_bytes()
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_bytes::ByteBuf;

    use super::*;

    #[test]
    fn bytes_pass_and_nothing_else_does() {
        assert_eq!(to_bytes(&ByteBuf::from([1, 2, 3])).unwrap(), [1, 2, 3]);
        assert!(to_bytes(&"text").is_err());
        assert!(to_bytes(&vec![1u8]).is_err());
        let bytes = ByteBuf::deserialize(BodyDeserializer::new(vec![4, 5])).unwrap();
        assert_eq!(bytes, [4, 5]);
        assert!(String::deserialize(BodyDeserializer::new(vec![0xff])).is_err());
    }
}
