//! What a step does: one kind of action, each with a file of its own.
//!
//! To add a kind: its file with a type that implements [`Form`], and one line of `kinds!` below. The type is what stands under
//! the kind's name in a step; everything else here follows from the line. What the kind does is the guest's: see
//! `guest-driver/src/exec.rs`.

mod file;
mod script;

use serde::{Deserialize, Serialize};

use crate::goal::{GoalError, Step};
use crate::object;

pub use file::FileStep;
pub use script::{ARGS_MAX, ENV_MAX, Script};

/// What a kind's type says of itself.
pub trait Form {
    /// Keys whose value is an octal number, and what it must be. In a draft they are written with quotes or a leading zero: a
    /// tool that writes numbers writes decimal ones, and their digits mean another number in octal.
    const OCTAL: &'static [(&'static str, &'static str)] = &[];

    /// Checks what types cannot express.
    ///
    /// # Errors
    /// A value cannot be used.
    fn check(&self) -> Result<(), Unusable>;

    /// Most bytes that are kept of each of its output streams.
    fn output_cap(&self) -> u32;
}

/// A value that has the right type and cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unusable {
    /// Its key, without the names of what is around it.
    pub key: &'static str,
    /// What is wrong with it.
    pub why: String,
}

impl Unusable {
    pub(crate) fn because<T>(key: &'static str, why: impl Into<String>) -> Result<T, Self> {
        let why = why.into();
        Err(Self { key, why })
    }
}

macro_rules! kinds {
    ($expecting:literal; $($(#[doc = $doc:literal])* $name:ident => $variant:ident($form:ty)),+ $(,)?) => {
        /// What a step does.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Action {
            $($(#[doc = $doc])* $variant($form),)+
        }

        /// A kind of action, without what it is to do.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Kind {
            $($(#[doc = $doc])* $variant,)+
        }

        impl Kind {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Its name in goals and in the guest's configuration.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => stringify!($name),)+
                }
            }

            /// See [`Form::OCTAL`].
            pub fn octal(self) -> &'static [(&'static str, &'static str)] {
                match self {
                    $(Self::$variant => <$form>::OCTAL,)+
                }
            }
        }

        impl Action {
            /// Its kind.
            pub fn kind(&self) -> Kind {
                match self {
                    $(Self::$variant(_) => Kind::$variant,)+
                }
            }

            /// See [`Form::output_cap`].
            pub fn output_cap(&self) -> u32 {
                match self {
                    $(Self::$variant(form) => form.output_cap(),)+
                }
            }

            fn check(&self) -> Result<(), Unusable> {
                match self {
                    $(Self::$variant(form) => form.check(),)+
                }
            }
        }

        /// A step as it is written: under the name of its kind is what it does. Whoever wrote it may have named no kind, or
        /// several, so it is no [`Step`] yet.
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, expecting = $expecting)]
        pub struct Written {
            pub(crate) id: String,
            $(
                #[serde(
                    default,
                    skip_serializing_if = "Option::is_none",
                    deserialize_with = "object::some"
                )]
                $name: Option<$form>,
            )+
            #[serde(default, skip_serializing_if = "is_false")]
            idempotent: bool,
            #[serde(default, skip_serializing_if = "is_false")]
            continue_on_error: bool,
        }

        impl Written {
            /// The only action that it has.
            fn action(&mut self) -> Option<Action> {
                let mut all = Vec::new();
                $(all.extend(self.$name.take().map(Action::$variant));)+
                let only = all.pop();
                only.filter(|_| all.is_empty())
            }
        }

        impl From<Step> for Written {
            fn from(step: Step) -> Self {
                let Step { id, action, idempotent, continue_on_error } = step;
                let mut written = Self { id, idempotent, continue_on_error, $($name: None),+ };
                match action {
                    $(Action::$variant(form) => written.$name = Some(form),)+
                }
                written
            }
        }
    };
}

kinds! {
    "a step: a mapping with the key `id`, and `script` or `file`";
    /// Run a program.
    script => Script(Script),
    /// Write a file.
    file => File(FileStep),
}

impl Written {
    /// Makes it a step; `at` is its place in the goal, for messages.
    pub(crate) fn checked(mut self, at: &str) -> Result<Step, GoalError> {
        let value = |key, why| GoalError::Value { key, why };
        let Some(action) = self.action() else {
            let kinds: Vec<_> = Kind::ALL
                .iter()
                .map(|k| format!("`{}`", k.name()))
                .collect();
            let why = format!("must have exactly one of {}", kinds.join(" and "));
            return Err(value(at.into(), why));
        };
        let kind = action.kind().name();
        let unusable = |u: Unusable| value(format!("{at}.{kind}.{}", u.key), u.why);
        action.check().map_err(unusable)?;
        Ok(Step {
            id: self.id,
            action,
            idempotent: self.idempotent,
            continue_on_error: self.continue_on_error,
        })
    }
}

fn is_false(b: &bool) -> bool {
    !*b
}

fn absolute(path: &str, key: &'static str) -> Result<(), Unusable> {
    no_nul(path, key)?;
    match path.starts_with('/') {
        true => Ok(()),
        false => Unusable::because(key, "must be an absolute path"),
    }
}

fn no_nul(text: &str, key: &'static str) -> Result<(), Unusable> {
    match text.contains('\0') {
        true => Unusable::because(key, "must not have a NUL byte"),
        false => Ok(()),
    }
}

fn root_user() -> String {
    "root".into()
}
