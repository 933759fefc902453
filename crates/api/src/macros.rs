//! Two forms in which the API's types are written down.

/// Structs of named fields, decoded in camel case; what is absent has the default.
macro_rules! records {
    ($(
        $(#[$meta:meta])*
        pub struct $name:ident { $( $(#[$field_meta:meta])* pub $field:ident : $type:ty ),* $(,)? }
    )*) => {$(
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, serde::Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        pub struct $name { $( $(#[$field_meta])* pub $field: $type ),* }
    )*};
}

/// Enums that are written by their protobuf name.
macro_rules! words {
    ($(
        $(#[$meta:meta])*
        pub enum $name:ident { $( $(#[$variant_meta:meta])* $variant:ident = $text:literal ),* $(,)? }
    )*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Deserialize)]
        pub enum $name { $( $(#[$variant_meta])* #[serde(rename = $text)] $variant ),* }

        impl $name {
            /// The protobuf name.
            pub const fn as_str(self) -> &'static str {
                match self { $( Self::$variant => $text ),* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    )*};
}
